"""Selection of methods by the config."""

from __future__ import annotations

import re

import pytest
import torch

from d2_distill.errors import PairError, UserError
from d2_distill.methods import DISTILL_METHOD_REGISTRY, build_methods, list_methods, refusals
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import build, detector_cfg, distiller_cfg

# Other tests of the process may have imported a user's file.
OURS = [name for name, method in DISTILL_METHOD_REGISTRY if method.__module__.startswith("d2_distill.")]


def teacher_of(case: str, **overrides) -> Teacher:
    cfg = detector_cfg(case, **overrides)
    return Teacher(build(cfg), input_format="BGR", cfg=cfg)


@pytest.fixture(scope="module")
def student():
    return stage_detector(build(detector_cfg("RetinaNet")))


@pytest.fixture(scope="module")
def teacher():
    return teacher_of("RetinaNet")


def test_in_the_order_of_the_config(student, teacher):
    names = ["PKD", "CrossKD", "FeatureImitation"]
    assert set(names) < set(list_methods())
    methods = build_methods(distiller_cfg("RetinaNet", None, names), student, teacher)
    assert list(methods) == names
    assert [list(method.weights.values()) for method in methods.values()] == [[2.0], [1.0, 1.0], [1.0]]


def test_methods_that_are_switched_off_are_left_out(student, teacher):
    cfg = distiller_cfg("RetinaNet", None, ["PKD", "FeatureImitation"], DISTILL__IMITATION__WEIGHT=0.0)
    assert list(build_methods(cfg, student, teacher)) == ["PKD"]


@pytest.mark.parametrize(
    "names, message",
    [
        (["PKD", "CrossKDD"], "MODEL.DISTILL.METHODS has the unknown 'CrossKDD'; choose from .*CrossKD, .*, LD, .*PKD"),
        (["PKD", "CrossKD", "PKD"], "MODEL.DISTILL.METHODS has 'PKD' twice"),
    ],
)
def test_unknown_and_repeated_names(student, teacher, names, message):
    with pytest.raises(UserError, match=message):
        build_methods(distiller_cfg("RetinaNet", None, names), student, teacher)


@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"TFHEAD"}))
def test_a_teacher_is_needed(student, name):
    with pytest.raises(UserError, match=f"{name} (with .* )?needs a teacher; set MODEL.DISTILL.TEACHER.CONFIG_FILE"):
        build_methods(distiller_cfg("RetinaNet", None, [name]), student, None)


@pytest.mark.parametrize(
    "name, node", [("CrossKD", "CROSSKD"), ("PKD", "PKD"), ("FeatureImitation", "IMITATION")]
)
def test_schedules_are_checked(student, teacher, name, node):
    key = f"DISTILL.{node}.SCHEDULE"
    cfg = distiller_cfg("RetinaNet", None, [name], **{key.replace(".", "__"): [["Warmup", -1]]})
    with pytest.raises(UserError, match=rf"MODEL\.{key}\[0\] is"):
        build_methods(cfg, student, teacher)


def test_an_impossible_pair_names_the_methods_that_serve_it(student):
    teacher = teacher_of("GeneralizedRCNN")
    cfg = distiller_cfg("RetinaNet", None, ["PKD", "LD"])
    random_state = torch.get_rng_state()
    with pytest.raises(PairError, match="^LD cannot use the .*RETINANET. Methods that serve this pair: ") as info:
        build_methods(cfg, student, teacher)
    named = str(info.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    assert named == ["FeatureImitation", "HEAD", "MSAD", "PKD", "TFHEAD"]
    for name, refusal in refusals(cfg, student, teacher).items():
        if name not in OURS:
            continue
        alone = distiller_cfg("RetinaNet", None, [name])
        if name in named:
            assert refusal is None and list(build_methods(alone, student, teacher)) == [name]
        else:
            with pytest.raises(UserError, match=re.escape(str(refusal))):
                build_methods(alone, student, teacher)
    assert not torch.equal(torch.get_rng_state(), random_state)  # of the adapters that were built
    random_state = torch.get_rng_state()
    refusals(cfg, student, teacher)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_serves_without_a_teacher(student):
    message = "^PKD needs a teacher; .*WEIGHTS. "
    r_cnn = {"ROI_HEADS__NAME": "CascadeROIHeads"}  # half described
    with pytest.raises(PairError, match=message + "No method serves this student without a teacher.$"):
        build_methods(distiller_cfg("RetinaNet", None, ["PKD"], **r_cnn), student, None)
    with pytest.raises(PairError, match=message + "Methods that serve this student without a teacher: TFHEAD.$"):
        build_methods(distiller_cfg("RetinaNet", None, ["PKD"]), student, None)


def test_a_wrong_value_is_not_the_pairs_fault(student, teacher):
    cfg = distiller_cfg("RetinaNet", None, ["CrossKD"], DISTILL__CROSSKD__BOX_TEMPERATURE=0.0)
    with pytest.raises(UserError, match="BOX_TEMPERATURE is 0.0; it must be positive.$") as info:
        build_methods(cfg, student, teacher)
    assert not isinstance(info.value, PairError)


@pytest.mark.parametrize("name", OURS)
def test_every_term_has_its_weight_and_schedule(name):
    cfg, method = distiller_cfg("GFL", None), DISTILL_METHOD_REGISTRY.get(name)
    terms = {term: float(value) for value, term in enumerate(method.WEIGHT_KEYS, start=2)}
    assert terms and all(term.startswith("loss_") for term in terms)
    for term, value in terms.items():
        cfg.merge_from_list([f"{method.KEY}.{method.WEIGHT_KEYS[term]}", value])
    keys = {term: f"{method.KEY}.{method.SCHEDULE_KEYS.get(term, 'SCHEDULE')}" for term in terms}
    constants = {key: float(value) for value, key in enumerate(sorted(set(keys.values())), start=2)}
    for key, value in constants.items():
        cfg.merge_from_list([key, [["Constant", value]]])
    found = method.common_arguments(cfg)
    assert found["weights"] == terms
    schedules = {term: schedule(0) for term, schedule in found["schedule"].items()}
    assert schedules == {term: constants[key] for term, key in keys.items()}


def test_head_refuses_teachers_whose_head_it_cannot_build(student):
    other = teacher_of("GeneralizedRCNN")
    other.staged.roi_heads = None  # as of heads that are none of Detectron2's own
    for teacher, message in [
        (teacher_of("MultiScaleDetector"), "HEAD cannot use the teacher MultiScaleDetector, .*this pair: CrossKD"),
        (other, "^HEAD cannot use the RoI heads of the teacher GeneralizedRCNN .*CascadeROIHeads'. Methods that serve"),
    ]:
        with pytest.raises(PairError, match=message):
            build_methods(distiller_cfg("RetinaNet", None, ["HEAD"]), student, teacher)

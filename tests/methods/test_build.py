"""Selection of methods by the config."""

from __future__ import annotations

import pytest

from d2_distill.errors import UserError
from d2_distill.methods import build_methods, list_methods
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import build, detector_cfg, distiller_cfg


@pytest.fixture(scope="module")
def student():
    return stage_detector(build(detector_cfg("RetinaNet")))


@pytest.fixture(scope="module")
def teacher():
    return Teacher(build(detector_cfg("RetinaNet")), input_format="BGR")


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
        (["PKD", "CrossKDD"], "MODEL.DISTILL.METHODS has the unknown 'CrossKDD'; choose from CrossKD, .*, LD, .*PKD"),
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

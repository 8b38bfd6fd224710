"""LD's terms against sums over single anchors, and what they must not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.assigners import atss_thresholds
from d2_distill.errors import UserError
from d2_distill.methods import build_methods
from d2_distill.regions import inside_boxes, valuable_region
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import NUM_CLASSES, batch, build, detector_cfg, distiller_cfg, image_input

STUDENTS = [
    "GFL",
    "GFLv2",
    "ATSS distributions",
    "OpenMMLabFCOS distributions",
    "OpenMMLabRetinaNet distributions",
]
ALL_TERMS = {
    f"DISTILL__LD__{name}__WEIGHT": 1.0 for name in ("MAIN_LD", "VLR_LD", "MAIN_KD", "VLR_KD")
}


def method_and_runs(case: str, inputs=None, **overrides):
    """The LD method of a config, and runs of an untrained student and another untrained detector as teacher."""
    inputs = batch() if inputs is None else inputs
    student, other = (build(detector_cfg(case), salt=salt) for salt in (1, 2))
    for model in (student, other):
        with torch.no_grad():
            model.head.bbox_pred.weight *= 30  # distributions that differ by more than rounding
    student, teacher = stage_detector(student), Teacher(other, input_format="BGR")
    cfg = distiller_cfg(case, None, ["LD"], **{**ALL_TERMS, **overrides})
    method = build_methods(cfg, student, teacher)["LD"]
    images = student.preprocess(inputs)
    ours = student.run(images, [x["instances"] for x in inputs])
    return method, ours, teacher.staged.run(images, frozen=True)


def divergence(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    p = (theirs.double() / temperature).softmax(dim=-1)
    q = (ours.double() / temperature).softmax(dim=-1)
    return temperature**2 * (p * (p.log() - q.log())).mean(dim=-1)


def slow_terms(ours, theirs, joint: bool = False) -> dict[str, torch.Tensor]:
    """All terms with T = 10 for boxes and 2 for classes, REFERENCE_IMAGES 0, anchor by anchor."""
    grid, truth = ours.grid, ours.truth
    foreground = ours.assignment.foreground
    outputs, targets = ({name: x.detach() for name, x in run.outputs.items()} for run in (ours, theirs))
    confidence = ours.staged.class_scores(outputs).amax(dim=-1)
    if ours.staged.assigns_points:
        region = inside_boxes(grid.centers, truth.boxes, truth.valid) * confidence * ~foreground
    else:
        thresholds = atss_thresholds(grid.boxes, grid.level_sizes, truth.boxes, grid.valid)
        region = valuable_region(grid.boxes, truth.boxes, truth.valid, thresholds, grid.valid)
    level_of = [level for level, size in enumerate(grid.level_sizes) for _ in range(size)]
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ("loss_ld", "loss_ld_vlr")}
    by_level: dict[str, dict[int, list]] = {"loss_kd": {}, "loss_kd_vlr": {}}
    for image in range(len(foreground)):
        for anchor, level in enumerate(level_of):
            rows = [x["deltas"][image, anchor].view(1 if joint else 4, -1) for x in (outputs, targets)]
            boxes = divergence(*rows, 10.0).mean()
            classes = divergence(*(x["logits"][image, anchor] for x in (outputs, targets)), 2.0)
            if foreground[image, anchor]:
                terms["loss_ld"] += boxes * confidence[image, anchor]
                by_level["loss_kd"].setdefault(level, []).append(classes)
            if region[image, anchor] > 0:
                terms["loss_ld_vlr"] += boxes * region[image, anchor]
                by_level["loss_kd_vlr"].setdefault(level, []).append(classes)
    for name, levels in by_level.items():
        terms[name] = sum(torch.stack(rows).mean() for rows in levels.values())
    return terms


@pytest.mark.parametrize("case", STUDENTS)
def test_terms_are_sums_over_anchors(case):
    joint = "RetinaNet" in case
    method, ours, theirs = method_and_runs(
        case, DISTILL__LD__REFERENCE_IMAGES=0, DISTILL__LD__REFERENCE_CLASSES=0,
        DISTILL__LD__SOFTMAX="anchor" if joint else "edge",
    )
    terms, expected = method(ours, theirs), slow_terms(ours, theirs, joint)
    assert set(terms) == set(expected) and all(value > 0 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-4, atol=1e-7)


def test_the_class_terms_do_not_depend_on_the_number_of_classes():
    """A mean over 3 classes times 3 / 80 is the sum over them in the scale of a mean over 80."""
    found = {}
    for reference in (80, 20, 0):
        method, *runs = method_and_runs("GFL", DISTILL__LD__REFERENCE_CLASSES=reference)
        found[reference] = method(*runs)
    for term in ("loss_kd", "loss_kd_vlr"):
        for reference in (80, 20):
            torch.testing.assert_close(found[reference][term], found[0][term] * NUM_CLASSES / reference)
    assert torch.equal(found[80]["loss_ld"], found[0]["loss_ld"])


def test_only_wanted_terms_are_computed():
    method, ours, theirs = method_and_runs("GFL", DISTILL__LD__VLR_KD__WEIGHT=0.0, DISTILL__LD__MAIN_LD__WEIGHT=0.0)
    assert set(method(ours, theirs)) == {"loss_ld_vlr", "loss_kd"}


def test_the_scale_does_not_depend_on_the_number_of_images():
    one = batch()[:1]
    terms = [method(*runs) for method, *runs in (method_and_runs("GFL", inputs) for inputs in (one, one * 3))]
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value)
    method, *runs = method_and_runs("GFL", one * 3, DISTILL__LD__REFERENCE_IMAGES=0)
    torch.testing.assert_close(method(*runs)["loss_ld"], terms[0]["loss_ld"])
    method, *runs = method_and_runs("GFL", one, DISTILL__LD__REFERENCE_IMAGES=0)
    torch.testing.assert_close(method(*runs)["loss_ld"] * 3, terms[0]["loss_ld"])


@pytest.mark.parametrize("case", STUDENTS)
@pytest.mark.parametrize("boxes", [[], [[40, 40, 41, 41]]], ids=["no ground truth", "a single pixel"])
def test_nothing_to_locate(case, boxes):
    """Terms stay finite and keep their graph; without ground truth they are 0."""
    method, ours, theirs = method_and_runs(case, [image_input(64, 96, boxes, [0] * len(boxes))])
    terms = method(ours, theirs)
    features = list(ours.features.values())
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)
        assert term.isfinite() and all(x is None or x.isfinite().all() for x in gradients), name
        assert any(x is not None for x in gradients), name
        assert boxes or term == 0, name


def test_the_same_weights_have_nothing_to_learn():
    method, ours, _ = method_and_runs("GFL")
    twin = stage_detector(copy.deepcopy(ours.staged.model))
    terms = method(ours, twin.run(ours.images, frozen=True))
    assert all(abs(term) < 1e-5 for term in terms.values())


def test_options_of_the_region():
    """The binary region counts its anchors alike; leaving out the positives leaves the rest."""
    method, ours, theirs = method_and_runs("GFL", DISTILL__LD__VLR__BINARY=True)
    weighted = method_and_runs("GFL")[0].valuable.values(ours, None)
    binary = method.valuable.values(ours, None)
    assert set(binary.unique().tolist()) == {0.0, 1.0} and torch.equal(binary > 0, weighted > 0)
    method = method_and_runs("GFL", DISTILL__LD__VLR__EXCLUDE_POSITIVES=True)[0]
    rest = method.valuable.values(ours, None)
    assert torch.equal(rest, weighted * ~ours.assignment.foreground)
    method = method_and_runs("GFL", DISTILL__LD__VLR__REGION="inside_box", DISTILL__LD__VLR__BINARY=True)[0]
    inside = method.valuable.values(ours, None) > 0
    expected = inside_boxes(ours.grid.centers, ours.truth.boxes, ours.truth.valid) & ~ours.assignment.foreground
    assert inside.any() and torch.equal(inside, expected)
    union = method_and_runs("GFL", DISTILL__LD__VLR__OVERLAP="union")[0].valuable.values(ours, None)
    assert (union > 0).sum() != (weighted > 0).sum()


@pytest.mark.parametrize("case", STUDENTS)
def test_gradient_reaches_the_student_alone(case):
    method, ours, theirs = method_and_runs(case)
    with EventStorage():
        sum(method(ours, theirs).values()).backward()
    head = ours.staged.model.head
    assert head.bbox_pred.weight.grad.any() and head.cls_score.weight.grad.any()
    assert all(parameter.grad is None for parameter in theirs.staged.model.parameters())


@pytest.mark.parametrize(
    "case, teacher_case, overrides, message",
    [
        ("ATSS", "GFL", {}, "LD cannot use the student ATSS .*teacher GFL.*REG_MAX above 0"),
        ("GFL", "RetinaNet", {}, "LD cannot use the teacher RetinaNet"),
        ("GFL", "GeneralizedRCNN", {}, "LD cannot use the teacher GeneralizedRCNN"),
        ("GFL", "OpenMMLabFCOS distributions", {}, "anchors of the student .GFL. and the teacher"),
        ("GFL", "GFL", {"GFL__REG_MAX": 8}, "student's REG_MAX is 8 and the teacher's 16"),
        ("GFL", "GFL", {"GFL__NUM_CLASSES": 5}, "LD's MAIN_KD or VLR_KD.*5 classes and the teacher 3"),
        ("GFL", "GFL", {"DISTILL__LD__SOFTMAX": "side"}, "LD.SOFTMAX is 'side'; choose from edge, anchor"),
        ("GFL", "GFL", {"DISTILL__LD__VLR__OVERLAP": "x"}, "LD.VLR.OVERLAP is 'x'; choose from iof, union"),
        ("GFL", "GFL", {"DISTILL__LD__SCHEDULE": [["Warmup", -1]]}, r"MODEL.DISTILL.LD.SCHEDULE\[0\] is"),
        ("GFL", "GFL", {"DISTILL__LD__MAIN_KD__TEMPERATURE": 0.0}, "MAIN_KD.TEMPERATURE is 0.0.*positive"),
    ],
)
def test_refusals(case, teacher_case, overrides, message):
    cfg, other = distiller_cfg(case, None, ["LD"], **overrides), detector_cfg(teacher_case)
    teacher = Teacher(build(other), input_format="BGR", cfg=other)
    student = stage_detector(build(detector_cfg(case, **{k: v for k, v in overrides.items() if "GFL" in k})))
    with pytest.raises(UserError, match=message):
        build_methods(cfg, student, teacher)


def test_boxes_alone_need_no_common_classes():
    cfg = distiller_cfg("GFL", None, ["LD"], DISTILL__LD__MAIN_KD__WEIGHT=0.0, GFL__NUM_CLASSES=5)
    student = stage_detector(build(detector_cfg("GFL", GFL__NUM_CLASSES=5)))
    methods = build_methods(cfg, student, Teacher(build(detector_cfg("GFL")), input_format="BGR"))
    assert set(methods["LD"].weights) == {"loss_ld", "loss_ld_vlr"}

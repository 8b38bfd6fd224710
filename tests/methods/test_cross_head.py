"""CrossKD on RetinaNet: what its terms depend on, and which parameters they teach."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from d2_distill.methods import build_methods
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, image_input

BOTH = {"loss_crosskd_cls", "loss_crosskd_box"}


class Pair:
    """CrossKD with a student and a teacher of other weights (or of the same), and runs of both."""

    def __init__(self, *, salt: int = 2, case: str = "RetinaNet", **options) -> None:
        cfg = distiller_cfg(case, None, ["CrossKD"], **options)
        self.student = stage_detector(build(detector_cfg(case), salt).train())
        self.teacher = Teacher(build(detector_cfg("RetinaNet"), salt=1), input_format="BGR")
        self.method = build_methods(cfg, self.student, self.teacher)["CrossKD"]

    def runs(self, inputs=None):
        inputs = inputs or batch()
        images, gt_instances = self.student.preprocess(inputs), [x["instances"] for x in inputs]
        taps = self.method.taps()
        ours = self.student.run(images, gt_instances, taps=taps)
        return ours, self.teacher.staged.run(images, gt_instances, taps=taps, frozen=True)

    def terms(self, inputs=None):
        return self.method(*self.runs(inputs))


@pytest.mark.parametrize("box_loss", ["giou", "iou"])
@pytest.mark.parametrize("tap", [0, 1, 2])
def test_equal_detectors_have_nothing_to_learn(tap, box_loss):
    options = {"DISTILL__CROSSKD__TAP": tap, "DISTILL__CROSSKD__BOX_LOSS": box_loss}
    same, other = Pair(salt=1, **options).terms(), Pair(**options).terms()
    assert set(same) == set(other) == BOTH
    for term in BOTH:
        assert abs(same[term]) < 1e-4 * other[term]


@pytest.mark.parametrize("tap", [0, 1, 2])
def test_scale_and_shift_of_the_students_tap_do_not_matter(tap):
    pair = Pair(DISTILL__CROSSKD__TAP=tap)
    ours, theirs = pair.runs()
    expected = pair.method(ours, theirs)
    torch.manual_seed(0)
    scale, shift = torch.rand(1, 32, 1, 1) * 5 + 0.2, torch.randn(1, 32, 1, 1)
    ours.taps = {branch: {tap: [x * scale + shift for x in kept[tap]]} for branch, kept in ours.taps.items()}
    for term, value in pair.method(ours, theirs).items():
        torch.testing.assert_close(value, expected[term], rtol=1e-3, atol=0)


@pytest.mark.parametrize("tap", [0, 1, 2])
def test_only_what_lies_in_front_of_the_tap_is_taught(tap):
    pair = Pair(DISTILL__CROSSKD__TAP=tap)
    sum(pair.terms().values()).backward()
    for name, parameter in pair.student.model.named_parameters():
        module, *rest = name.split(".")[1:]
        in_front = not name.startswith("head") or (module.endswith("subnet") and int(rest[0]) // 2 < tap)
        assert (parameter.grad is not None and parameter.grad.any()) == in_front, name
        assert in_front or parameter.grad is None
    assert all(p.grad is None for p in pair.teacher.model.parameters())


def test_each_term_teaches_its_own_branch():
    pair = Pair()
    head = pair.student.model.head
    for term, (taught, other) in {
        "loss_crosskd_cls": (head.cls_subnet[0], head.bbox_subnet[0]),
        "loss_crosskd_box": (head.bbox_subnet[0], head.cls_subnet[0]),
    }.items():
        wanted = [taught.weight, other.weight]
        found, missing = torch.autograd.grad(pair.terms()[term], wanted, allow_unused=True)
        assert found.any() and missing is None


@pytest.mark.parametrize("key, left", [("CLS", {"loss_crosskd_box"}), ("BOX", {"loss_crosskd_cls"})])
def test_one_term_alone(key, left):
    pair = Pair(**{f"DISTILL__CROSSKD__{key}_WEIGHT": 0.0})
    both = Pair().terms()
    alone = pair.terms()
    assert set(alone) == left
    assert all(torch.equal(value, both[term]) for term, value in alone.items())


def test_crossed_predictions_are_the_teachers_rest_on_the_students_tap():
    """The whole method again, image by image and anchor by anchor, for one tap; no function of it shared."""
    pair = Pair(case="OpenMMLabRetinaNet")
    ours, theirs = pair.runs()
    head, total, positives = pair.teacher.model.head, 0.0, 0
    labels = ours.assignment.labels
    first = 0
    for level, (x, y) in enumerate(zip(ours.taps["cls"][1], theirs.taps["cls"][1])):
        x, y = (feature.detach().transpose(0, 1).flatten(1) for feature in (x, y))
        aligned = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
        aligned = (aligned * y.std(1, keepdim=True) + y.mean(1, keepdim=True)).clamp(min=0)
        side = ours.features[f"p{level + 3}"].shape[-1]
        aligned = aligned.unflatten(1, (2, side, side)).transpose(0, 1)
        crossed, own = (
            head.cls_score(head.cls_subnet[2:](x)).detach() for x in (aligned, theirs.taps["cls"][1][level])
        )
        for image in range(2):
            for index in range(side * side * 6):
                cell, anchor = divmod(index, 6)
                if labels[image, first + index] < 0:
                    continue
                channels = slice(3 * anchor, 3 * anchor + 3)
                student = crossed[image, channels, cell // side, cell % side].sigmoid()
                teacher = own[image, channels, cell // side, cell % side].sigmoid()
                entropy = -(teacher * student.log() + (1 - teacher) * (1 - student).log())
                total += (entropy * (student - teacher).abs()).sum().item()
        first += side * side * 6
    for image in range(2):
        positives += max(int(((labels[image] >= 0) & (labels[image] < 3)).sum()), 1)
    assert (labels < 0).any() and positives > 2
    assert pair.terms()["loss_crosskd_cls"].item() == pytest.approx(total / positives, rel=1e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        [image_input(64, 96), image_input(96, 64, seed=1)],
        [image_input(64, 96), *batch()],
        # No anchor overlaps a box of 3 pixels enough to be positive.
        [image_input(96, 96, [[40, 40, 43, 43]], [1])],
        [image_input(32, 32, [[4, 4, 24, 24]], [1])],
    ],
    ids=["no boxes", "an image without boxes", "tiny box", "one cell"],
)
@pytest.mark.parametrize("case", ["RetinaNet", "OpenMMLabRetinaNet"])
def test_few_or_no_positives_stay_finite(case, inputs):
    pair = Pair(case=case)
    terms = pair.terms(inputs)
    assert set(terms) == BOTH and all(term.isfinite() and term >= 0 for term in terms.values())
    sum(terms.values()).backward()
    gradients = [p.grad for p in pair.student.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_ignored_anchors_teach_nothing():
    """The sums over the even and over the odd anchors make up the sum over all."""
    pair = Pair()
    ours, theirs = pair.runs()
    every = ours.assignment
    expected = {term: value * every.normalizer for term, value in pair.method(ours, theirs).items()}
    odd = torch.arange(every.labels.shape[1]) % 2
    halves = []
    for half in (0, 1):
        ours.assignment = dataclasses.replace(every, labels=every.labels.where(odd == half, -1))
        terms = pair.method(ours, theirs)
        halves.append({term: value * ours.assignment.normalizer for term, value in terms.items()})
    for term in BOTH:
        assert halves[0][term] > 0 and halves[1][term] > 0
        torch.testing.assert_close(halves[0][term] + halves[1][term], expected[term])


def test_an_image_without_positives_counts_as_one():
    pair = Pair()
    empty = [image_input(64, 96), image_input(96, 64, seed=1)]
    assert pair.runs(empty)[0].assignment.normalizer == 2

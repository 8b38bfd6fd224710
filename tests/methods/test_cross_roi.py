"""CrossKD on Faster R-CNN: against a slow form, what it teaches, empty inputs, pairs that do not fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align

from d2_distill.detectors.roi_heads import RoIOutputs, RoIStage
from d2_distill.errors import UserError
from d2_distill.methods import build_methods
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, image_input

CASE = "GeneralizedRCNN"
BOTH = {"loss_crosskd_roi_cls", "loss_crosskd_roi_box"}
# Another backbone than the student's.
TEACHER = {"RESNETS__RES2_OUT_CHANNELS": 32}


class Pair:
    """CrossKDRoI between a student and a teacher."""

    def __init__(self, *, salt: int = 2, teacher=None, student=None, case: str = CASE, teacher_case: str = CASE, **options) -> None:
        student = student or {}
        cfg = distiller_cfg(case, None, ["CrossKDRoI"], **student, **options)
        self.student = stage_detector(build(detector_cfg(case, **student), salt).train())
        other = detector_cfg(teacher_case, **(TEACHER if teacher is None else teacher))
        self.teacher = Teacher(build(other, salt=1), input_format="BGR", cfg=other)
        self.method = build_methods(cfg, self.student, self.teacher)["CrossKDRoI"]

    def runs(self, inputs=None):
        inputs = inputs or batch()
        images, gt_instances = self.student.preprocess(inputs), [x["instances"] for x in inputs]
        return self.student.run(images, gt_instances), self.teacher.staged.run(images, gt_instances, frozen=True)

    def terms(self, inputs=None):
        torch.manual_seed(3)
        with EventStorage():
            return self.method(*self.runs(inputs))


MEAN = {"DISTILL__CROSSKD_ROI__REFERENCE_CLASSES": 0}


def slow_predictions(roi_heads, features, image: int, box: torch.Tensor):
    """Class logits and deltas of one box of an image, layer by layer."""
    x1, y1, x2, y2 = box.tolist()
    level = math.floor(4 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 224 + 1e-8))
    level = min(max(level, 2), 5)
    feature = features[f"p{level}"][image : image + 1]
    pooled = roi_align(feature, [box[None]], 7, 1 / 2**level, sampling_ratio=0, aligned=True)
    head, predictor = roi_heads.box_head, roi_heads.box_predictor
    x = head.fc2(head.fc1(pooled.flatten(1)).relu()).relu()
    return predictor.cls_score(x)[0], predictor.bbox_pred(x)[0]


def test_the_box_term_does_not_depend_on_the_number_of_classes():
    found = {}
    for reference in (0, 80):
        pair = Pair(teacher=TEACHER, DISTILL__CROSSKD_ROI__REFERENCE_CLASSES=reference)
        torch.manual_seed(3)
        with EventStorage(), torch.no_grad():
            found[reference] = pair.method(*pair.runs())
    torch.testing.assert_close(found[80]["loss_crosskd_roi_box"], found[0]["loss_crosskd_roi_box"] * 3 / 80)
    torch.testing.assert_close(found[80]["loss_crosskd_roi_cls"], found[0]["loss_crosskd_roi_cls"])


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_against_a_slow_form(class_agnostic, temperature):
    key = {"ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": class_agnostic}
    pair = Pair(teacher={**TEACHER, **key}, DISTILL__CROSSKD_ROI__TEMPERATURE=temperature, **MEAN)
    torch.manual_seed(3)
    with EventStorage(), torch.no_grad():
        ours, theirs = pair.runs()
        terms = pair.method(ours, theirs)
    assert set(terms) == BOTH
    roi_heads = copy.deepcopy(pair.teacher.model.roi_heads).double()
    student, teacher = ({name: x.double() for name, x in run.features.items()} for run in (ours, theirs))
    cls_losses, box_losses = [], []
    with torch.no_grad():
        for image, proposals in enumerate(ours.sampled_proposals):
            for box in proposals.proposal_boxes.tensor.double():
                logits, deltas = slow_predictions(roi_heads, student, image, box)
                target_logits, target_deltas = slow_predictions(roi_heads, teacher, image, box)
                p = (logits / temperature).softmax(0).tolist()
                q = (target_logits / temperature).softmax(0).tolist()
                assert len(p) == 4
                cls_losses.append(temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q)))
                classes = len(deltas) // 4
                assert classes == (1 if class_agnostic else 3)
                box_losses.append((deltas - target_deltas).abs().sum().item() / classes)
    assert len(cls_losses) == sum(len(x) for x in ours.sampled_proposals) > 4
    for term, slow in (("loss_crosskd_roi_cls", cls_losses), ("loss_crosskd_roi_box", box_losses)):
        assert terms[term].item() == pytest.approx(sum(slow) / len(slow), rel=1e-3)


def test_the_proposals_are_those_of_the_students_losses(monkeypatch):
    pair = Pair()
    seen = []
    predictor = pair.student.model.roi_heads.box_predictor
    losses = predictor.losses

    def recording(predictions, proposals):
        seen.append(proposals)
        return losses(predictions, proposals)

    monkeypatch.setattr(predictor, "losses", recording)
    torch.manual_seed(3)
    with EventStorage():
        run, _ = pair.runs()
        sampled = run.sampled_proposals
        assert run.losses
    assert len(seen) == 1
    for ours, theirs in zip(sampled, seen[0]):
        assert torch.equal(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
        assert torch.equal(ours.gt_classes, theirs.gt_classes) and (ours.gt_classes < 3).any()


def test_equal_detectors_have_nothing_to_learn():
    same, other = Pair(salt=1, teacher={}).terms(), Pair().terms()
    for term in BOTH:
        assert abs(same[term]) < 1e-4 * other[term]


def test_only_the_students_features_are_taught():
    pair = Pair()
    before = {name: value.clone() for name, value in pair.teacher.model.state_dict().items()}
    for term, value in pair.terms().items():
        parameters = dict(pair.student.model.named_parameters())
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        taught = {name.partition(".")[0] for name, gradient in zip(parameters, gradients) if gradient is not None}
        assert taught == {"backbone"}
        assert any(gradient.any() for gradient in reached) and all(g.isfinite().all() for g in reached), term
    assert all(p.grad is None for p in pair.teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.model.state_dict().items())


def test_a_term_of_weight_0_is_left_out():
    assert set(Pair(DISTILL__CROSSKD_ROI__BOX_WEIGHT=0.0).terms()) == {"loss_crosskd_roi_cls"}


def test_images_without_ground_truth():
    terms = Pair().terms([image_input(64, 96), image_input(96, 64)])
    assert all(torch.isfinite(value) and value > 0 for value in terms.values())


def test_no_proposal_at_all():
    pair = Pair()
    ours, theirs = pair.runs()
    empty = [Instances((64, 96), proposal_boxes=Boxes(torch.zeros(0, 4))) for _ in range(2)]
    ours.rois = [RoIStage(empty, RoIOutputs([], torch.zeros(0, 4), torch.zeros(0, 12)))]
    for value in pair.method(ours, theirs).values():
        assert value == 0


def test_levels_are_matched_by_stride():
    """A student whose pyramid has more levels than the teacher's head reads."""
    pair = Pair(teacher={**TEACHER, "ROI_HEADS__IN_FEATURES": ["p3", "p4"]})
    assert pair.method.levels == {"p3": "p3", "p4": "p4"}
    assert all(torch.isfinite(value) for value in pair.terms().values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"case": "RetinaNet"}, "cannot use the student RetinaNet .*both must be GeneralizedRCNN"),
        ({"teacher": {"FPN__OUT_CHANNELS": 16}}, "p2 has 32 channels and the teacher's p2 has 16.*FPN.OUT_CHANNELS"),
        ({"teacher": {"ROI_HEADS__NUM_CLASSES": 4}}, "student has 3 classes and the teacher 4"),
        ({"DISTILL__CROSSKD_ROI__TEMPERATURE": 0.0}, "CROSSKD_ROI.TEMPERATURE is 0.0; it must be above 0"),
        (
            {
                "student": {
                    "FPN__IN_FEATURES": ["res3", "res4", "res5"],
                    "RPN__IN_FEATURES": ["p3", "p4", "p5"],
                    "ROI_HEADS__IN_FEATURES": ["p3", "p4", "p5"],
                    "ANCHOR_GENERATOR__SIZES": [[32], [64], [96]],
                }
            },
            r"reads 'p2' of stride 4, and the student has strides \[8, 16, 32\] only; .*FPN.IN_FEATURES",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Pair(**options)


def test_cascades():
    """As a teacher refused, as a student served: its proposals are sampled as ever."""
    with pytest.raises(UserError, match="teacher with a cascade of box heads"):
        Pair(teacher_case="GeneralizedRCNN cascade", teacher={})
    terms = Pair(case="GeneralizedRCNN cascade").terms()
    assert all(torch.isfinite(value) and value > 0 for value in terms.values())

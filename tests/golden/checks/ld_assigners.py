"""Assigners and regions of the published localisation distillation code."""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from d2_distill.assigners import GroundTruth, match_atss
from d2_distill.boxes.geometry import centers_of
from d2_distill.boxes.overlaps import pairwise_overlaps
from d2_distill.detectors.box_coders import DistributionCoder
from d2_distill.regions import finegrained_region, general_instance_rows, inside_boxes, valuable_region

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient

STRIDES = (8, 16, 32, 64, 128)
NUM_CLASSES = 4


def _ground_truth(boxes: torch.Tensor, classes: torch.Tensor) -> GroundTruth:
    """Of one image."""
    return GroundTruth(boxes[None], classes[None], torch.ones(1, len(boxes), dtype=torch.bool))


def check_assign(case: Case) -> None:
    params, anchors = case.data["params"], case.tensor("in_anchors").float()
    gt = _ground_truth(case.tensor("in_gt_bboxes"), case.tensor("in_gt_labels"))
    level_sizes = case.tensor("in_num_level").tolist()
    matches, thresholds = match_atss(anchors, level_sizes, gt.boxes, gt.valid, topk=params["topk"])
    assignment = gt.assignment(matches, NUM_CLASSES)
    overlaps = pairwise_overlaps(anchors[:, None], assignment.boxes[0, :, None])[:, 0, 0]
    unmatched = matches[0] < 0
    actual = {
        "out_gt_inds": matches[0] + 1,
        "out_labels": assignment.labels[0].masked_fill(unmatched, -1),
        "out_iou_threshold": thresholds[0],
        "out_max_overlaps": overlaps.masked_fill(unmatched, -1e8 if gt.valid.any() else 0),
        "out_im_fitnet": inside_boxes(centers_of(anchors), gt.boxes, gt.valid)[0],
        "out_im_finegrained": finegrained_region(anchors, gt.boxes, gt.valid)[0],
    }
    if params["ties"]:
        # Which of equally distant anchors become candidates is open: only what holds of any choice.
        for key in ("out_gt_inds", "out_labels", "out_iou_threshold", "out_max_overlaps"):
            del actual[key]
        assert (overlaps >= thresholds[0, matches[0]])[~unmatched].all()
        thresholds = case.tensor("out_iou_threshold")[None]
    actual["out_vlr"] = valuable_region(
        anchors, gt.boxes, gt.valid, thresholds, gamma=params["vlr_gamma"]
    )[0]
    if not gt.valid.any():  # the reference returns nothing of use here
        del actual["out_iou_threshold"]
        assert not actual.pop("out_vlr").any()
    for key, value in actual.items():
        assert_recorded(case, key, value)


def check_gi_region(case: Case) -> None:
    params, anchors = case.data["params"], case.tensor("in_anchors").float()
    strides, coder = torch.full((len(anchors),), params["stride"]), DistributionCoder(reg_max=16)
    scores = [case.tensor(f"in_{who}_cls").sigmoid() for who in ("student", "teacher")]
    boxes = [coder.decode(case.tensor(f"in_{who}_reg"), anchors, strides) for who in ("student", "teacher")]
    rows = general_instance_rows(
        *scores, *boxes, nms_thresh=params["nms_iou"], max_rows=params["max_keep"]
    )
    assert_recorded(case, "out_index", rows)


def check_decouple_intended(case: Case) -> None:
    params = case.data["params"]
    students = [case.tensor(f"in_s_x{level}").float().requires_grad_() for level in range(len(STRIDES))]
    teachers = [case.tensor(f"in_t_x{level}").float() for level in range(len(STRIDES))]
    generator = DefaultAnchorGenerator(
        sizes=[[8.0 * stride] for stride in STRIDES], aspect_ratios=[[1.0]], strides=STRIDES, offset=0.0
    )
    levels = generator(students)
    anchors, level_sizes = torch.cat([boxes.tensor for boxes in levels]), [len(boxes) for boxes in levels]
    boxes = case.tensor("in_gt_bboxes0")
    gt = _ground_truth(boxes, torch.full((len(boxes),), NUM_CLASSES - 1))
    matches = match_atss(anchors, level_sizes, gt.boxes, gt.valid).matches
    foreground = inside_boxes(centers_of(anchors), gt.boxes, gt.valid)[0]
    assert_recorded(case, "out_labels", gt.assignment(matches, NUM_CLASSES).labels[0])
    assert_recorded(case, "out_mask", foreground)

    losses = []
    for student, teacher, mask in zip(students, teachers, foreground.split(level_sizes)):
        errors = (student - teacher).square().mean(dim=1).flatten()
        both = errors[mask].mean() + params["bg_multiplier"] * errors[~mask].mean()
        losses.append(params["loss_weight"] * both if mask.any() else errors.sum() * 0)
    assert_recorded(case, "out_per_level", torch.stack(losses))
    torch.stack(losses).sum().backward()
    for level, student in enumerate(students):
        assert_recorded_gradient(case, f"out_grad_s_x{level}", student.grad)


CHECKS = {
    "assign": check_assign,
    "decouple_intended": check_decouple_intended,
    "gi_region": check_gi_region,
}

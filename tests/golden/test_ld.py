"""Parity with numbers of the published localisation distillation code: what it shares with CrossKD so far."""

from __future__ import annotations

import pytest
import torch

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from d2_distill.assigners import valid_locations
from d2_distill.losses import giou_loss, kd_kl_div_loss, weighted_mean

from .cases import Case, case_names, load
from .dispatch import assert_recorded, run_check

SUITE = "ld"


def kind_of(case: Case) -> str:
    """Name of the case; for the IoU losses, which are recorded under one name, the class."""
    return case.data["reference"][0].split("::")[1] if case.name.startswith("iouloss") else case.name


def check_kd_kl(case: Case) -> None:
    params = case.data["params"]
    student = case.tensor("in_student").float().requires_grad_()
    teacher, weight = case.tensor("in_teacher").float(), case.tensor("in_weight")
    rows = kd_kl_div_loss(student, teacher, temperature=params["T"], class_reduction="mean")
    mean = params["loss_weight"] * weighted_mean(rows, weight, params["avg_factor"])
    mean.backward()
    assert_recorded(case, "out_elementwise", params["loss_weight"] * weight * rows)
    assert_recorded(case, "out_mean", mean)
    assert_recorded(case, "out_plain", params["loss_weight"] * rows.mean())
    assert_recorded(case, "out_grad_student", student.grad)


def check_giou_loss(case: Case) -> None:
    params = case.data["params"]
    boxes, weight = case.tensor("in_pred").requires_grad_(), case.tensor("in_weight")
    rows = giou_loss(boxes, case.tensor("in_target"), eps=params["eps"])
    mean = params["loss_weight"] * weighted_mean(rows, weight, params["avg_factor"])
    mean.backward()
    assert_recorded(case, "out_elementwise", params["loss_weight"] * weight * rows)
    assert_recorded(case, "out_mean", mean)
    assert_recorded(case, "out_grad_pred", boxes.grad)
    assert_recorded(
        case, "out_all_zero_weight", weighted_mean(rows, torch.zeros_like(weight), params["avg_factor"])
    )


def check_anchors(case: Case) -> None:
    strides, grid_sizes = case.arrays["in_strides"].tolist(), case.arrays["in_feat_sizes"].tolist()
    generator = DefaultAnchorGenerator(
        sizes=[[8.0 * stride] for stride in strides], aspect_ratios=[[1.0]], strides=strides, offset=0.0
    )
    anchors = generator([torch.zeros(1, 1, *size) for size in grid_sizes])
    assert_recorded(case, "out_num_level", [len(boxes) for boxes in anchors])
    assert_recorded(case, "out_anchors", torch.cat([boxes.tensor for boxes in anchors]))
    valid = valid_locations(tuple(case.arrays["in_pad_shape"].tolist()), grid_sizes, strides)
    assert torch.equal(valid, case.tensor("out_valid"))


CHECKS = {"kd_kl": check_kd_kl, "GIoULoss": check_giou_loss, "anchors": check_anchors}

PENDING = {
    kind: "localisation distillation (issue 3)"
    for kind in (
        "CIoULoss",
        "DIoULoss",
        "assign",
        "decouple_intended",
        "dfl",
        "distance_coder",
        "gfl_loss",
        "gi_region",
        "head_forward",
        "imloss",
        "inference",
        "integral",
        "ld_loss",
        "ldatss_loss",
        "ldfcos_loss",
        "ldretina_loss",
        "ldv2_loss",
        "nms",
        "overlaps",
        "qfl",
        "voc_eval",
    )
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    case = load(SUITE, name)
    run_check(kind_of(case), case, CHECKS, PENDING)

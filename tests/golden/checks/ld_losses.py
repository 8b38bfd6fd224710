"""Losses and overlaps of the published localisation distillation code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import torch
import torch.nn.functional as F

from d2_distill.boxes.overlaps import pairwise_overlaps
from d2_distill.losses import (
    ciou_loss,
    diou_loss,
    distribution_focal_loss,
    giou_loss,
    kd_kl_div_loss,
    quality_focal_loss,
    weighted_mean,
)

from ..cases import Case
from ..dispatch import assert_recorded


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


def check_quality_focal(case: Case) -> None:
    params = case.data["params"]
    predictions, weight = case.tensor("in_pred").float().requires_grad_(), case.tensor("in_weight")
    classes = F.one_hot(case.tensor("in_label"), predictions.shape[1] + 1)[:, :-1]
    targets = classes * case.tensor("in_score")[:, None]
    loss = quality_focal_loss(predictions, targets, params["beta"], from_logits=params["use_sigmoid"])
    _assert_reduced(case, loss.sum(dim=1), weight, predictions)


def check_distribution_focal(case: Case) -> None:
    logits = case.tensor("in_pred").float().requires_grad_()
    rows = distribution_focal_loss(logits, case.tensor("in_target"))
    _assert_reduced(case, rows, case.tensor("in_weight"), logits)


def check_box_loss(case: Case, loss: Callable) -> None:
    boxes, weight = case.tensor("in_pred").requires_grad_(), case.tensor("in_weight")
    rows = loss(boxes, case.tensor("in_target"), eps=case.data["params"]["eps"])
    _assert_reduced(case, rows, weight, boxes)
    without = weighted_mean(rows, torch.zeros_like(weight), case.data["params"]["avg_factor"])
    assert_recorded(case, "out_all_zero_weight", without)


def check_ciou_loss(case: Case) -> None:
    """Boxes that match exactly, for which nan is recorded, cost 0 and get no gradient."""
    rows, gradient = case.tensor("out_elementwise"), case.tensor("out_grad_pred")
    exact = (case.tensor("in_pred") == case.tensor("in_target")).all(dim=1)
    assert torch.equal(rows.isnan(), exact) and exact.any() and gradient[exact].isnan().all()
    arrays = {
        **case.arrays,
        "out_elementwise": rows.nan_to_num().numpy(),
        "out_mean": rows.nansum().numpy() / case.data["params"]["avg_factor"],
        "out_grad_pred": gradient.nan_to_num().numpy(),
    }
    check_box_loss(dataclasses.replace(case, arrays=arrays), ciou_loss)


def _assert_reduced(case: Case, rows: torch.Tensor, weight: torch.Tensor, predictions: torch.Tensor) -> None:
    params = case.data["params"]
    mean = params["loss_weight"] * weighted_mean(rows, weight, params["avg_factor"])
    (gradient,) = torch.autograd.grad(mean, predictions, retain_graph=True)
    assert_recorded(case, "out_elementwise", params["loss_weight"] * weight * rows)
    assert_recorded(case, "out_mean", mean)
    assert_recorded(case, "out_grad_pred", gradient)


def check_imitation(case: Case) -> None:
    student = case.tensor("in_student").float().requires_grad_()
    loss = case.data["params"]["loss_weight"] * F.mse_loss(student, case.tensor("in_teacher").float())
    loss.backward()
    assert_recorded(case, "out_loss", loss)
    assert_recorded(case, "out_grad_student", student.grad)


def check_overlaps(case: Case) -> None:
    """The recorded "diou" divides the intersection by the first box's area."""
    boxes1, boxes2 = case.tensor("in_boxes1"), case.tensor("in_boxes2")
    for mode, recorded in (("iou", "iou"), ("iof", "iof"), ("iof_diou", "diou")):
        assert_recorded(case, f"out_{recorded}", pairwise_overlaps(boxes1, boxes2, mode))
    assert_recorded(case, "out_giou", 1 - giou_loss(boxes1[:, None], boxes2))
    aligned = boxes1[: len(boxes2), None], boxes2[:, None]
    assert_recorded(case, "out_aligned_iou", pairwise_overlaps(*aligned, "iou").flatten())
    assert_recorded(case, "out_aligned_iof", pairwise_overlaps(*aligned, "iof").flatten())
    assert_recorded(case, "out_aligned_giou", 1 - giou_loss(*aligned).flatten())


CHECKS = {
    "kd_kl": check_kd_kl,
    "qfl": check_quality_focal,
    "dfl": check_distribution_focal,
    "GIoULoss": functools.partial(check_box_loss, loss=giou_loss),
    "DIoULoss": functools.partial(check_box_loss, loss=diou_loss),
    "CIoULoss": check_ciou_loss,
    "imloss": check_imitation,
    "overlaps": check_overlaps,
}

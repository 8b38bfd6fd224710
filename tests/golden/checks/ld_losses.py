"""Losses and overlaps of the published localisation distillation code."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F

from d2_distill.boxes import overlaps
from d2_distill.boxes.overlaps import pairwise_overlaps
from d2_distill.detectors.box_coders import DistributionCoder
from d2_distill.losses import (
    ciou_loss,
    diou_loss,
    distribution_focal_loss,
    giou_loss,
    kd_kl_div_loss,
    linear_iou_loss,
    log_iou_loss,
    quality_focal_loss,
    weighted_mean,
)
from d2_distill.methods import FeatureImitation
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule

from ..cases import Case
from ..dispatch import assert_close, assert_recorded


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
    predictions = case.tensor("in_pred").float().requires_grad_()
    classes = F.one_hot(case.tensor("in_label"), predictions.shape[1] + 1)[:, :-1]
    targets = classes * case.tensor("in_score")[:, None]
    loss = quality_focal_loss(predictions, targets, params["beta"], from_logits=params["use_sigmoid"])
    _assert_reduced(case, loss.sum(dim=1), predictions)


def check_distribution_focal(case: Case) -> None:
    logits, coder = case.tensor("in_pred").float().requires_grad_(), DistributionCoder(case.data["params"]["reg_max"])
    assert logits.shape[1] == coder.box_dim // 4
    _assert_reduced(case, distribution_focal_loss(logits, coder.targets(case.tensor("in_target"))), logits)


def check_box_loss(case: Case, loss: Callable[..., torch.Tensor]) -> None:
    """CIoU: boxes that match exactly, for which nan is recorded, cost 0 and get no gradient."""
    boxes, targets = case.tensor("in_pred").requires_grad_(), case.tensor("in_target")
    rows = loss(boxes, targets, eps=case.data["params"]["eps"])
    exact = case.tensor("out_elementwise").isnan()
    assert not exact.any() or (loss is ciou_loss and torch.equal(exact, (boxes == targets).all(dim=1)))
    assert not rows[exact].any()
    _assert_reduced(case, rows, boxes, undefined=exact)
    without = weighted_mean(rows, torch.zeros_like(case.tensor("in_weight")), case.data["params"]["avg_factor"])
    assert_recorded(case, "out_all_zero_weight", without)


def check_iou_loss(case: Case) -> None:
    params = case.data["params"]
    linear = params.get("linear", False) or params.get("mode", "log") == "linear"
    check_box_loss(case, linear_iou_loss if linear else log_iou_loss)


def _assert_reduced(
    case: Case, rows: torch.Tensor, predictions: torch.Tensor, undefined: torch.Tensor | None = None
) -> None:
    """The losses of rows, their weighted mean and its gradient.

    Args:
        undefined: rows for which the reference has no number, so that it has none for the mean, either.
    """
    params, weight = case.data["params"], case.tensor("in_weight")
    mean = params["loss_weight"] * weighted_mean(rows, weight, params["avg_factor"])
    (gradient,) = torch.autograd.grad(mean, predictions, retain_graph=True)
    elementwise = params["loss_weight"] * weight * rows
    if undefined is not None and undefined.any():
        assert gradient[undefined].abs().max() < 1e-6 and case.tensor("out_mean").isnan()
        assert_close(case, "out_mean", mean, case.tensor("out_elementwise").nansum() / params["avg_factor"])
        elementwise = elementwise.masked_fill(undefined, torch.nan)
        gradient = gradient.masked_fill(undefined[:, None], torch.nan)
    else:
        assert_recorded(case, "out_mean", mean)
    assert_recorded(case, "out_elementwise", elementwise)
    assert_recorded(case, "out_grad_pred", gradient)


def check_imitation(case: Case) -> None:
    """Rows as the cells of a map."""
    student, weight = case.tensor("in_student").float().requires_grad_(), case.data["params"]["loss_weight"]
    maps = {"student": student, "teacher": case.tensor("in_teacher").float()}
    runs = [SimpleNamespace(features={"p3": rows.t()[None, :, None]}) for rows in maps.values()]
    method = FeatureImitation(
        pairs=[FeaturePair("p3", "p3", student.shape[1], student.shape[1])],
        adapt=False,
        weights={"loss_imitation": weight},
        schedule=build_schedule([]),
    )
    loss = method(*runs)["loss_imitation"] * method.weight_at("loss_imitation", 0)
    loss.backward()
    assert_recorded(case, "out_loss", loss)
    assert_recorded(case, "out_grad_student", student.grad)


def check_overlaps(case: Case) -> None:
    """The recorded "diou" divides the intersection by the first box's area."""
    boxes1, boxes2, eps = case.tensor("in_boxes1"), case.tensor("in_boxes2"), case.data["params"]["eps"]
    assert eps == overlaps.EPS
    for mode, recorded in (("iou", "iou"), ("iof", "iof"), ("iof_diou", "diou")):
        assert_recorded(case, f"out_{recorded}", pairwise_overlaps(boxes1, boxes2, mode))
    assert_recorded(case, "out_giou", 1 - giou_loss(boxes1[:, None], boxes2, eps))
    aligned = boxes1[: len(boxes2), None], boxes2[:, None]
    assert_recorded(case, "out_aligned_iou", pairwise_overlaps(*aligned, "iou").flatten())
    assert_recorded(case, "out_aligned_iof", pairwise_overlaps(*aligned, "iof").flatten())
    assert_recorded(case, "out_aligned_giou", 1 - giou_loss(*aligned, eps).flatten())


CHECKS = {
    "kd_kl": check_kd_kl,
    "qfl": check_quality_focal,
    "dfl": check_distribution_focal,
    "GIoULoss": functools.partial(check_box_loss, loss=giou_loss),
    "DIoULoss": functools.partial(check_box_loss, loss=diou_loss),
    "CIoULoss": functools.partial(check_box_loss, loss=ciou_loss),
    "IoULoss": check_iou_loss,
    "imloss": check_imitation,
    "overlaps": check_overlaps,
}

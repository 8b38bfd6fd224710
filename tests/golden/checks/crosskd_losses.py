"""Losses, box coding and alignment of the published CrossKD code."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F

from d2_distill import losses
from d2_distill.detectors.box_coders import DistributionCoder, TwoSidedBox2BoxTransform
from d2_distill.detectors.criteria import focal_class_loss
from d2_distill.losses.channel_statistics import EPS, IMAGES_AND_LOCATIONS, deviation
from d2_distill.methods import CrossKD
from d2_distill.methods.schedules import build_schedule

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient
from ..openmmlab import BOX_LOSSES, assignment_of, build_given

# An element-wise loss of the predictions, and the weights that it is summed with; None for none.
Weighted = tuple[torch.Tensor, "torch.Tensor | None"]


def _kd_quality_focal(case: Case, pred: torch.Tensor) -> Weighted:
    targets = case.tensor("in.teacher_logits").sigmoid()
    loss = losses.quality_focal_loss(pred, targets, beta=case.data["options"]["beta"])
    return loss, case.tensor("in.weight")[:, None] if "in.weight" in case.arrays else None


def _quality_focal(case: Case, pred: torch.Tensor) -> Weighted:
    classes = F.one_hot(case.tensor("in.label"), case.data["options"]["num_classes"] + 1)[:, :-1]
    targets = classes * case.tensor("in.score")[:, None]
    loss = losses.quality_focal_loss(pred, targets, beta=case.data["options"]["beta"])
    return loss, case.tensor("in.weight")[:, None]


def _distribution_focal(case: Case, pred: torch.Tensor) -> Weighted:
    coder = DistributionCoder(case.data["options"]["reg_max"])
    assert pred.shape[1] == coder.box_dim // 4
    return losses.distribution_focal_loss(pred, coder.targets(case.tensor("in.label"))), case.tensor("in.weight")


def _kd_kl_div(case: Case, pred: torch.Tensor) -> Weighted:
    options = case.data["options"]
    loss = losses.kd_kl_div_loss(
        pred,
        case.tensor("in.teacher_logits"),
        temperature=options["T"],
        class_reduction=options["class_reduction"],
    )
    return loss, case.tensor("in.weight")


def _box_loss(case: Case, pred: torch.Tensor) -> Weighted:
    options, name = case.data["options"], loss_name(case)
    loss = losses.BOX_LOSSES[BOX_LOSSES[(name, options["mode"]) if "mode" in options else name]]
    return loss(pred, case.tensor("in.target"), eps=options["eps"]), case.tensor("in.weight")


def _focal(case: Case, pred: torch.Tensor) -> Weighted:
    """The detectors' loss is a sum; here it is taken of each anchor alone."""
    options = case.data["options"]
    settings = {
        "NUM_CLASSES": options["num_classes"],
        "FOCAL_LOSS_ALPHA": options["alpha"],
        "FOCAL_LOSS_GAMMA": options["gamma"],
    }
    model = build_given("ATSS", [8], {f"ATSS.{key}": value for key, value in settings.items()})
    assignments = [
        assignment_of(label.view(1, 1), torch.zeros(1, 1, 4), model.num_classes) for label in case.tensor("in.label")
    ]
    alpha, gamma = model.criterion.focal_loss_alpha, model.criterion.focal_loss_gamma
    rows = [
        focal_class_loss(logits.view(1, 1, -1), assignment, alpha=alpha, gamma=gamma)
        for logits, assignment in zip(pred, assignments)
    ]
    return torch.stack(rows), case.tensor("in.weight")


def loss_name(case: Case) -> str:
    """Class of the loss that was run."""
    return case.data["reference"].split("::")[1].split()[0]


def check_loss(case: Case, elementwise: Callable[[Case, torch.Tensor], Weighted]) -> None:
    options = case.data["options"]
    pred = case.tensor("in.pred").requires_grad_()
    loss, weight = elementwise(case, pred)
    reduction = options.get("reduction", "mean")
    assert reduction in ("none", "mean")
    if options.get("avg_factor") is not None:
        assert reduction == "mean"
        loss = losses.weighted_mean(loss, weight, options["avg_factor"])
    else:
        loss = loss if weight is None else loss * weight
        loss = loss if reduction == "none" else loss.mean()
    loss = loss * options["loss_weight"]
    loss.sum().backward()
    assert_recorded(case, "out.loss", loss)
    assert_recorded(case, "out.grad_pred", pred.grad)


class _Crossed(CrossKD):
    """CrossKD of the centerness alone, whose crossed outputs are given."""

    def __init__(self, crossed: torch.Tensor, weight: float, normalizer: float) -> None:
        super().__init__(
            crossings={}, cls_beta=1.0, box_loss="giou", box_temperature=1.0, normalizer_floor=normalizer,
            weights={"loss_crosskd_centerness": weight}, schedule=build_schedule([]),
        )
        self._crossed = crossed

    def crossed_outputs(self, student, teacher) -> dict[str, torch.Tensor]:
        return {"centerness": self._crossed}


def check_centerness(case: Case) -> None:
    """Every anchor is positive; the normaliser is recorded, so that it is the method's lower bound here."""
    options, pred = case.data["options"], case.tensor("in.pred").requires_grad_()
    crossed, theirs = pred[None, :, None], case.tensor("in.teacher_logits")[None, :, None]
    positive = torch.ones(1, len(pred), dtype=torch.bool)
    student = SimpleNamespace(
        grid=None,
        assignment=SimpleNamespace(valid=positive, foreground=positive),
        staged=SimpleNamespace(normalizer=lambda grid, assignment: torch.zeros(())),
    )
    method = _Crossed(crossed, options["loss_weight"], options["avg_factor"])
    (term, value), = method(student, SimpleNamespace(outputs={"centerness": theirs})).items()
    loss = value * method.weight_at(term, 0)
    loss.backward()
    assert_recorded(case, "out.loss", loss)
    assert_recorded(case, "out.grad_pred", pred.grad)


def check_pkd(case: Case) -> None:
    pred = case.tensor("in.pred").requires_grad_()
    loss = case.data["options"]["loss_weight"] * losses.pearson_loss(pred, case.tensor("in.teacher_feat"))
    loss.backward()
    if case.tensor("out.loss").isnan():
        assert case.data["informative"], "a nan is recorded only where the reference has no guard"
        assert case.tensor("out.grad_pred").isnan().all() and pred[:, 0].numel() == 1
        assert loss == 0 and not pred.grad.any()
        case.skip("tolerance")  # no number is left to compare
        return
    assert_recorded(case, "out.loss", loss)
    assert_recorded(case, "out.grad_pred", pred.grad)


def check_align(case: Case) -> None:
    options, student = case.data["options"], case.tensor("in.student_feat").requires_grad_()
    assert options["eps"] == EPS
    axes = ",".join("NCHW"[axis] for axis in IMAGES_AND_LOCATIONS)
    assert options["axes"] == f"{axes} per channel, one level at a time"
    centered = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    unbiased = centered.std(dim=IMAGES_AND_LOCATIONS, keepdim=True, unbiased=options["unbiased_std"])
    torch.testing.assert_close(deviation(centered), unbiased)

    aligned = losses.align_statistics(student, case.tensor("in.teacher_feat"))
    (aligned * case.tensor("in.cotangent")).sum().backward()
    assert_recorded(case, "out.aligned", aligned)
    assert_recorded_gradient(case, "out.grad_student_feat", student.grad)


def check_coder(case: Case) -> None:
    options = case.data["options"]
    coder = delta_transform(options["means"], options["stds"], options["wh_ratio_clip"])
    anchors = case.tensor("in.anchors")
    assert_recorded(case, "out.boxes", coder.apply_deltas(case.tensor("in.deltas"), anchors))
    assert_recorded(case, "out.encoded_gt", coder.get_deltas(anchors, case.tensor("in.gt")))


def delta_transform(means, stds, wh_ratio_clip: float) -> TwoSidedBox2BoxTransform:
    """OpenMMLab's DeltaXYWHBBoxCoder; ours has no means, which are what an anchor itself is encoded as."""
    transform = TwoSidedBox2BoxTransform(weights=tuple(1 / std for std in stds), scale_clamp=-math.log(wh_ratio_clip))
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert transform.get_deltas(box, box)[0].tolist() == list(means)
    return transform


CHECKS = {
    "KDQualityFocalLoss": functools.partial(check_loss, elementwise=_kd_quality_focal),
    "QualityFocalLoss": functools.partial(check_loss, elementwise=_quality_focal),
    "DistributionFocalLoss": functools.partial(check_loss, elementwise=_distribution_focal),
    "KnowledgeDistillationKLDivLoss": functools.partial(check_loss, elementwise=_kd_kl_div),
    "GIoULoss": functools.partial(check_loss, elementwise=_box_loss),
    "DIoULoss": functools.partial(check_loss, elementwise=_box_loss),
    "CIoULoss": functools.partial(check_loss, elementwise=_box_loss),
    "IoULoss": functools.partial(check_loss, elementwise=_box_loss),
    "FocalLoss": functools.partial(check_loss, elementwise=_focal),
    "CrossEntropyLoss": check_centerness,
    "PKDLoss": check_pkd,
    "align_scale": check_align,
    "coder": check_coder,
}

"""Whole training losses with distillation of the published localisation distillation code."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.utils.events import EventStorage

from d2_distill.config.keys import get_distill_cfg
from d2_distill.methods import LD

from ..cases import Case
from ..dispatch import assert_recorded, assert_recorded_gradient, assert_recorded_sum
from ..ld_runs import RecordedRuns, recorded_runs
from .ld_imitation import assert_region, imitation_terms

# Kind of case -> keys below MODEL.DISTILL.LD, from specifications of the published code; ours are written so that
# a term's weight is that of the sum over anchors of the mean over the sides.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ld_loss": {"VLR_KD.WEIGHT": 10.0},
    "ldv2_loss": {},
    "ldatss_loss": {"VLR_LD.WEIGHT": 0.15 * 0.25},
    "ldfcos_loss": {"VLR_LD.WEIGHT": 0.25 * 0.25},
    "ldretina_loss": {
        "MAIN_LD.WEIGHT": 5 / 4,
        "VLR_LD.WEIGHT": 0.03 * 5 / 4,
        "MAIN_KD.TEMPERATURE": 8.0,
        "SOFTMAX": "anchor",
        "VLR.EXCLUDE_POSITIVES": True,
    },
}
# Our name of a loss -> the recorded ones; which of them is there depends on the kind.
_NAMES = {
    "loss_cls": ("out_loss_cls",),
    "loss_box_reg": ("out_loss_bbox",),
    "loss_dfl": ("out_loss_dfl",),
    "loss_centerness": ("out_loss_centerness",),
    "loss_ld": ("out_loss_ld",),
    "loss_ld_vlr": ("out_loss_ld_vlr", "out_loss_ld_neg"),
    "loss_kd": ("out_loss_kd", "out_loss_cls_kd"),
    "loss_imitation": ("out_loss_im",),
    # In the published code this term has a factor of 0, so that it is no part of the total.
    "loss_kd_vlr": ("out_vlr_kd_raw",),
}


def ld_terms(case: Case, runs: RecordedRuns) -> dict[str, torch.Tensor]:
    """Weighted terms, with the options of the published code."""
    kind = next(kind for kind in _OPTIONS if case.name.startswith(kind))
    cfg = get_distill_cfg()
    options = {"REFERENCE_IMAGES": 0, **_OPTIONS[kind]}
    cfg.merge_from_list([x for key, value in options.items() for x in (f"MODEL.DISTILL.LD.{key}", value)])
    method = LD(**LD.weights_and_schedule(cfg), **LD.arguments(cfg.MODEL.DISTILL.LD, runs.student.staged))
    terms = method(runs.student, runs.teacher)
    return {name: value * method.weight_at(name, 0) for name, value in terms.items()}


def check_losses(case: Case) -> None:
    runs = recorded_runs(case)
    with EventStorage():
        losses = {**runs.student.losses, **ld_terms(case, runs), **imitation_terms(case, runs)}
    for name, value in losses.items():
        recorded = [key for key in _NAMES[name] if key in case.arrays]
        assert len(recorded) == 1 or name == "loss_kd_vlr", name
        for key in recorded:
            assert_recorded_sum(case, key, value)
    losses.pop("loss_kd_vlr", None)
    total = sum(losses.values())
    assert_recorded(case, "out_total", total)
    leaves = {name: leaf for name, leaf in runs.leaves.items() if f"out_grad_{name}" in case.arrays}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        assert_recorded_gradient(case, f"out_grad_{name}", gradient)
    assert_targets(case, runs)
    assert_region(case, runs)


def assert_targets(case: Case, runs: RecordedRuns) -> None:
    """Labels, boxes and the valuable region, where they were recorded."""
    assignment = runs.student.assignment
    if "out_num_total_pos" in case.arrays:
        assert assignment.normalizer == case.tensor("out_num_total_pos")
        labels = case.tensor("out_tgt_labels")
        labels[case.tensor("out_tgt_label_weights") == 0] = -1
        assert torch.equal(assignment.labels, labels)
        positive = assignment.foreground
        assert torch.equal(assignment.boxes[positive], case.tensor("out_tgt_bbox_targets")[positive])
        cfg = get_distill_cfg()
        method = LD(**LD.weights_and_schedule(cfg), **LD.arguments(cfg.MODEL.DISTILL.LD, runs.student.staged))
        assert_recorded(case, "out_tgt_vlr", method.valuable.values(runs.student, None))


CHECKS = {kind: check_losses for kind in _OPTIONS}

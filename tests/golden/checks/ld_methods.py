"""Whole training losses, plain and distilled, of the published localisation distillation code."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.utils.events import EventStorage

from d2_distill.config.keys import get_distill_cfg
from d2_distill.methods import build_methods
from d2_distill.methods.imitation_regions import REGIONS
from d2_distill.staged import DenseRun
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_close, assert_recorded, assert_recorded_gradient, assert_recorded_sum
from ..ld_runs import RecordedRuns, recorded_runs
from ..openmmlab import in_our_order, level_sizes, num_sizes_and_ratios, set_keys

# Rows that the published code divides the sum over box distributions by, where a case does not say otherwise.
ROWS = 4
# Published name of an imitated region -> ours.
_REGIONS = {"finegrained": "finegrained", "fitnet": "inside_gt", "gibox": "gibox"}
# Our name of a loss -> the recorded ones; which of them is there depends on the kind.
_NAMES = {
    "loss_cls": ("out_loss_cls",),
    "loss_box_reg": ("out_loss_bbox",),
    "loss_dfl": ("out_loss_dfl",),
    "loss_centerness": ("out_loss_centerness",),
    "loss_ld": ("out_loss_ld",),
    "loss_ld_vlr": ("out_loss_ld_vlr", "out_loss_ld_neg"),
    "loss_kd": ("out_loss_kd", "out_loss_cls_kd"),
    "loss_kd_vlr": ("out_loss_kd_neg",),
    "loss_imitation": ("out_loss_im",),
}


def ld_settings(case: Case, runs: RecordedRuns) -> dict[str, Any]:
    """Keys below MODEL.DISTILL.LD.

    Ours are written so that a term's weight is that of the sum over anchors of the mean over the sides; the
    published code sums rows, of which an anchor has one a side, or a single one for the RetinaNet.
    """
    params, is_retinanet = case.data["params"], runs.student.staged.kind == "OpenMMLabRetinaNet"
    rows_of_anchor = 1 if is_retinanet else 4
    main, classes = params["loss_ld"], params["loss_kd"]
    weight = main["w"] * rows_of_anchor / main.get("avg_factor", ROWS)
    if "loss_ld_vlr" in params:
        region = params["loss_ld_vlr"]
        region_weight, temperature = region["w"] * rows_of_anchor / region["avg_factor"], region["T"]
    else:
        region_weight, temperature = params["vlr_multiplier"] * weight, main["T"]
    return {
        "REFERENCE_IMAGES": 0,
        "REFERENCE_CLASSES": 0,
        "MAIN_LD.WEIGHT": weight,
        "MAIN_LD.TEMPERATURE": float(main["T"]),
        "VLR_LD.WEIGHT": region_weight,
        "VLR_LD.TEMPERATURE": float(temperature),
        "MAIN_KD.WEIGHT": float(classes["w"]),
        "MAIN_KD.TEMPERATURE": float(classes["T"]),
        "SOFTMAX": "anchor" if is_retinanet else "edge",
        "VLR.EXCLUDE_POSITIVES": is_retinanet,
    }


def distillation(case: Case, runs: RecordedRuns) -> dict[str, torch.Tensor]:
    """Weighted terms of LD and of the imitation; "loss_kd_vlr" as it was before the published code's factor."""
    params = case.data["params"]
    assert "in_s_x0" in case.arrays or not params.get("im_weight")
    settings = {f"LD.{key}": value for key, value in ld_settings(case, runs).items()}
    if "out_vlr_kd_raw" in case.arrays or params.get("vlr_kd_multiplier"):
        classes = params["loss_kd"]
        settings.update({"LD.VLR_KD.WEIGHT": float(classes["w"]), "LD.VLR_KD.TEMPERATURE": float(classes["T"])})
    settings["METHODS"] = ("LD", "FeatureImitation")
    settings["IMITATION.WEIGHT"] = float(params.get("im_weight", 0))
    settings["IMITATION.REGION"] = _REGIONS[params.get("im_mode", "fitnet")]
    settings["IMITATION.ADAPTER"] = settings["IMITATION.GI_PER_IMAGE"] = False
    cfg = get_distill_cfg()
    set_keys(cfg, settings, "MODEL.DISTILL.")
    methods = build_methods(cfg, runs.student.staged, Teacher(runs.teacher.staged.model, input_format="BGR"))
    if "out_tgt_vlr" in case.arrays:
        assert_recorded(case, "out_tgt_vlr", methods["LD"].valuable.values(runs.student, None))
    if "out_tgt_labels0" in case.arrays:
        _assert_point_labels(case, runs.student, methods["LD"])
    return {
        name: value * method.weight_at(name, 0)
        for method in methods.values()
        for name, value in method(runs.student, runs.teacher).items()
    }


def check_losses(case: Case) -> None:
    runs = recorded_runs(case)
    with EventStorage():
        losses = {**runs.student.losses, **distillation(case, runs)}
    if "out_vlr_kd_raw" in case.arrays:
        assert_recorded_sum(case, "out_vlr_kd_raw", losses["loss_kd_vlr"])
    if "loss_kd_vlr" in losses:
        losses["loss_kd_vlr"] = losses["loss_kd_vlr"] * case.data["params"].get("vlr_kd_multiplier", 0)
    for name, keys in _NAMES.items():
        recorded = [key for key in keys if key in case.arrays]
        assert len(recorded) == 1 or name not in losses, name
        for key in recorded:  # a term of weight 0 is not computed
            assert_recorded_sum(case, key, losses.get(name, 0.0))
    total = sum(losses.values())
    assert_recorded(case, "out_total", total)
    assert_gradients(case, runs, total)
    assert_targets(case, runs)
    assert_regions(case, runs)


def assert_gradients(case: Case, runs: RecordedRuns, total: torch.Tensor) -> None:
    """Of the inputs; a single 0 is recorded for those that no gradient reaches."""
    leaves = {name: leaf for name, leaf in runs.leaves.items() if f"out_grad_{name}" in case.arrays}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if case.arrays[f"out_grad_{name}"].shape != leaf.shape:
            assert not gradient.any()
            gradient = gradient.new_zeros(case.arrays[f"out_grad_{name}"].shape)
        assert_recorded_gradient(case, f"out_grad_{name}", gradient)


def assert_targets(case: Case, runs: RecordedRuns) -> None:
    """Anchors, labels and boxes, where they were recorded."""
    run, model = runs.student, runs.student.staged.model
    for level, anchors in enumerate(run.grid.level_boxes()):
        if f"out_anchors_l{level}" in case.arrays:
            per_cell = num_sizes_and_ratios(model)
            recorded = case.tensor(f"out_anchors_l{level}").unflatten(0, (-1, per_cell[0] * per_cell[1]))
            recorded = in_our_order(model, recorded, dim=1).flatten(0, 1)
            assert_close(case, f"anchors of level {level}", anchors.tensor, recorded)
    assignment = run.assignment
    if "out_tgt_labels" in case.arrays:
        assert assignment.normalizer == case.tensor("out_num_total_pos")
        assert_recorded(case, "out_tgt_label_weights", assignment.labels >= 0)
        assert_recorded(case, "out_tgt_labels", assignment.labels.masked_fill(assignment.labels < 0, model.num_classes))
        assert_recorded(case, "out_tgt_bbox_targets", assignment.boxes)


def _assert_point_labels(case: Case, run: DenseRun, method) -> None:
    """Of FCOS: images one after the other; one class more than the background stands for the valuable region."""
    values = method.valuable.values(run, lambda: torch.ones_like(run.assignment.labels))
    labels = run.assignment.labels.masked_fill(values > 0, run.staged.num_classes + 1)
    for level, of_level in enumerate(labels.split(level_sizes(run), dim=1)):
        assert_recorded(case, f"out_tgt_labels{level}", of_level.flatten())


def assert_regions(case: Case, runs: RecordedRuns) -> None:
    """The cells that are imitated, where they were recorded."""
    if "out_tgt_im_region" in case.arrays:
        # Where the published code selects general instances it records the inside of the boxes.
        region = _REGIONS[case.data["params"]["im_mode"]].replace("gibox", "inside_gt")
        assert_recorded(case, "out_tgt_im_region", REGIONS[region](runs.student, runs.teacher))
    if "out_gi_index0" in case.arrays:
        chosen = REGIONS["gibox"](runs.student, runs.teacher, per_image=False)
        for level, mask in enumerate(chosen.split(level_sizes(runs.student), dim=1)):
            rows = mask.flatten().nonzero()[:, 0]
            assert_close(case, f"instances of level {level}", rows, case.tensor(f"out_gi_index{level}").sort().values)


def check_plain_losses(case: Case) -> None:
    """Without a positive the reference divides by 0, for which ours is 0."""
    runs = recorded_runs(case)
    with EventStorage():
        losses = dict(runs.student.losses)
    total = sum(losses.values())
    leaves = list(runs.leaves.values())
    gradients = dict(zip(runs.leaves, torch.autograd.grad(total, leaves)))
    has_positive = runs.student.assignment.foreground.any()
    for name, value in losses.items():
        (key,) = _NAMES[name]
        if has_positive or name == "loss_cls":
            assert_recorded_sum(case, key, value)
        else:
            assert value == 0 and case.tensor(key).isnan().all()
    if has_positive:
        assert_recorded(case, "out_total", total)
    else:
        assert case.tensor("out_total").isnan()
    for name, gradient in gradients.items():
        if has_positive or name.startswith("s_cls"):
            assert_recorded_gradient(case, f"out_grad_{name}", gradient)
        else:
            assert not gradient.any() and case.tensor(f"out_grad_{name}").isnan().all()


CHECKS = {
    "gfl_loss": check_plain_losses,
    **dict.fromkeys(("ld_loss", "ldv2_loss", "ldatss_loss", "ldfcos_loss", "ldretina_loss"), check_losses),
}

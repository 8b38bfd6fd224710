"""Assigners and regions of the published localisation distillation code."""

from __future__ import annotations

import torch
from torch import nn

from d2_distill.boxes.geometry import centers_of
from d2_distill.boxes.overlaps import pairwise_overlaps
from d2_distill.config.keys import get_distill_cfg
from d2_distill.methods import build_methods
from d2_distill.methods.imitation_regions import REGIONS, scores_and_boxes
from d2_distill.regions import general_instance_rows
from d2_distill.staged import DenseRun
from d2_distill.teacher import Teacher

from ..cases import Case
from ..dispatch import assert_close, assert_recorded, assert_recorded_gradient
from ..ld_runs import REG_MAX, STRIDES
from ..openmmlab import (
    assignment_of,
    atss_matches,
    atss_thresholds,
    build_given,
    given_run,
    instances_of,
    level_sizes,
    set_keys,
    valuable_values,
)


def _methods(run: DenseRun, settings: dict) -> nn.ModuleDict:
    """Methods between a detector and itself as the teacher."""
    cfg = get_distill_cfg()
    set_keys(cfg, settings, "MODEL.DISTILL.")
    return build_methods(cfg, run.staged, Teacher(run.staged.model, input_format="BGR"))


def _gfl_run(
    grids: list[list[int]], boxes: torch.Tensor, classes: torch.Tensor, settings: dict, maps=(), frozen: bool = False
) -> DenseRun:
    """GFL on one image that its levels' grids cover, which predicts nothing of interest."""
    num_classes = int(max(classes.tolist(), default=0)) + 1
    settings = {"GFL.NUM_CLASSES": num_classes, **{f"GFL.{key}": value for key, value in settings.items()}}
    model = build_given("GFL", STRIDES[: len(grids)], settings, maps=maps)
    predictions = {"logits": num_classes, "deltas": model.box_coder.box_dim}
    size = [side * STRIDES[0] for side in grids[0]]
    return given_run(
        model,
        {name: [torch.zeros(1, channels, *grid) for grid in grids] for name, channels in predictions.items()},
        [size],
        [instances_of(size, boxes, classes)],
        frozen=frozen,
    )


def check_assign(case: Case) -> None:
    params, truth = case.data["params"], (case.tensor("in_gt_bboxes"), case.tensor("in_gt_labels"))
    run = _gfl_run(case.arrays["in_feat_sizes"].tolist(), *truth, {"ATSS_TOPK": params["topk"]})
    anchors = run.grid.boxes
    assert torch.equal(anchors, case.tensor("in_anchors").float())
    assert level_sizes(run) == case.tensor("in_num_level").tolist()
    matches, thresholds = atss_matches(run)[0], atss_thresholds(run)[0]
    labels = run.assignment.labels[0]
    assert torch.equal(labels[matches >= 0], truth[1][matches[matches >= 0]])
    actual = {
        "out_gt_inds": matches + 1,
        "out_labels": labels.masked_fill(matches < 0, -1),
        "out_max_overlaps": _overlaps(anchors, truth[0], matches),
        "out_im_fitnet": REGIONS["inside_gt"](run, None)[0],
        "out_im_finegrained": REGIONS["finegrained"](run, None)[0],
    }
    ld = _methods(run, {"METHODS": ("LD",), "LD.VLR.GAMMA": params["vlr_gamma"]})["LD"]
    if len(truth[0]):
        actual["out_iou_threshold"] = thresholds
        actual["out_vlr"] = ld.valuable.values(run, None)[0]
    else:  # the reference returns nothing of use here
        assert not ld.valuable.values(run, None).any()
    assert params["ties"] == _has_ties(run)
    if params["ties"]:
        _assert_tie_break(case, run, ld)
        for key in ("out_gt_inds", "out_labels", "out_iou_threshold", "out_max_overlaps", "out_vlr"):
            del actual[key]
    for key, value in actual.items():
        assert_recorded(case, key, value)


def _has_ties(run: DenseRun) -> bool:
    """Whether it is open which of equally distant anchors is a candidate of a box."""
    distances = torch.cdist(centers_of(run.truth.boxes[0]).double(), run.grid.centers.double())
    topk = run.staged.model.assigner.topk
    levels = [level.sort(dim=1).values for level in distances.split(level_sizes(run), dim=1)]
    return any((x[:, topk] - x[:, topk - 1] < 1e-6).any() for x in levels if x.shape[1] > topk)


def _overlaps(anchors: torch.Tensor, boxes: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """IoU with the matched box, as the reference has it: -1e8 for none, 0 if there are no boxes at all."""
    if not len(boxes):
        return anchors.new_zeros(len(anchors))
    overlaps = pairwise_overlaps(anchors, boxes).gather(1, matches.clamp(min=0)[:, None])[:, 0]
    return overlaps.masked_fill(matches < 0, -1e8)


def _assert_tie_break(case: Case, run: DenseRun, ld) -> None:
    """Which of equally distant anchors become candidates is open: the recorded choice fits what it led to."""
    boxes, classes = case.tensor("in_gt_bboxes"), case.tensor("in_gt_labels")
    anchors, matches = run.grid.boxes, case.tensor("out_gt_inds") - 1
    positive, thresholds = matches >= 0, case.tensor("out_iou_threshold")
    assert_recorded(case, "out_labels", classes[matches.clamp(min=0)].masked_fill(~positive, -1))
    overlaps = _overlaps(anchors, boxes, matches)
    assert_recorded(case, "out_max_overlaps", overlaps)
    assert (overlaps >= thresholds[matches])[positive].all()
    # Ties are few: our choice and the recorded one differ by little.
    assert (matches != atss_matches(run)[0]).sum() <= 1
    torch.testing.assert_close(atss_thresholds(run)[0], thresholds, rtol=0.05, atol=0)
    assert_recorded(case, "out_vlr", valuable_values(run, ld.valuable, thresholds[None])[0])


def check_gi_region(case: Case) -> None:
    """Rows are the anchors of one level of several images, one after the other."""
    params, anchors = case.data["params"], case.tensor("in_anchors").float()
    num_images, stride = params["num_images"], params["stride"]
    columns = len(anchors[:, 0].unique())
    rows = len(anchors) // num_images // columns
    size = (rows * stride, columns * stride)
    runs = []
    for role in ("student", "teacher"):
        predictions = {
            output: [case.tensor(f"in_{role}_{key}").float().view(num_images, rows, columns, -1).permute(0, 3, 1, 2)]
            for output, key in (("logits", "cls"), ("deltas", "reg"))
        }
        settings = {"GFL.NUM_CLASSES": predictions["logits"][0].shape[1], "GFL.REG_MAX": REG_MAX}
        runs.append(given_run(build_given("GFL", [stride], settings), predictions, [size] * num_images))
        assert torch.equal(runs[-1].grid.boxes.repeat(num_images, 1), anchors)
    predictions = [x.flatten(0, 1) for pair in zip(*map(scores_and_boxes, runs)) for x in pair]
    chosen = general_instance_rows(*predictions, nms_thresh=params["nms_iou"], max_rows=params["max_keep"])
    assert_recorded(case, "out_index", chosen)


def check_decouple_intended(case: Case) -> None:
    """Neither classes nor their number are recorded, but the labels that they lead to."""
    params = case.data["params"]
    maps = {role: [case.tensor(f"in_{role}_x{level}").float() for level in range(len(STRIDES))] for role in "st"}
    boxes = case.tensor("in_gt_bboxes0")
    classes = torch.full((len(boxes),), int(case.tensor("out_labels").max()) - 1)
    grids = [list(x.shape[-2:]) for x in maps["s"]]
    for x in maps["s"]:
        x.requires_grad_()
    runs = [_gfl_run(grids, boxes, classes, {}, maps=maps[role], frozen=role == "t") for role in "st"]
    assert_recorded(case, "out_labels", runs[0].assignment.labels[0])
    inside = REGIONS["decouple"](*runs)
    assert_recorded(case, "out_mask", inside[0])
    # The method leaves out levels without a positive, which count here.
    assignment = runs[0].assignment
    runs[0].assignment = assignment_of(
        assignment.labels.masked_fill(inside, 0), assignment.boxes, assignment.num_classes
    )
    losses = []
    for level in runs[0].features:
        method = _methods(runs[0], {
            "METHODS": ("FeatureImitation",),
            "IMITATION.REGION": "decouple",
            "IMITATION.WEIGHT": params["loss_weight"],
            "IMITATION.BACKGROUND_WEIGHT": float(params["bg_multiplier"]),
            "IMITATION.ADAPTER": False,
            "IMITATION.IN_FEATURES": (level,),
        })["FeatureImitation"]
        ((term, value),) = method(*runs).items()
        losses.append(value * method.weight_at(term, 0))
    assert_close(case, "out_per_level", torch.stack(losses), case.tensor("out_per_level"))
    for level, gradient in enumerate(torch.autograd.grad(sum(losses), maps["s"])):
        assert_recorded_gradient(case, f"out_grad_s_x{level}", gradient)


CHECKS = {
    "assign": check_assign,
    "decouple_intended": check_decouple_intended,
    "gi_region": check_gi_region,
}

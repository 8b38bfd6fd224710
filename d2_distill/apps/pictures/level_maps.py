"""What a student and its teacher see on each level of their pyramids, and what the methods' regions select there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

from ...errors import UserError
from ...methods.feature_imitation import build_region
from ...methods.imitation_regions import cells_of, scores_and_boxes
from ...methods.localization import LD
from ...regions import feature_energy, focal_masks, spatial_attention
from ...staged import Run
from ...teacher import Teacher

VALUABLE = "vlr"
# Name -> what it selects, in the order in which they are shown; "decouple" is "inside_gt" with a background.
SELECTED = {
    "main": "cells with a positive anchor",
    VALUABLE: "valuable region of LD",
    "finegrained": "anchors near objects",
    "gibox": "10 anchors that differ most (GI)",
    "inside_gt": "cell centres in boxes",
}

# How the colours of a quantity are scaled: each map from its least to its largest value, each from 0 to its largest,
# or all maps of this scaling together from 0.
OWN_RANGE, OWN_MAXIMUM, COMMON = "own range", "own maximum", "common"


@dataclass(frozen=True)
class LevelMaps:
    """A quantity on the levels of one image.

    Attributes:
        title, note: what it is, and how it is computed, a short line each.
        scaling: one of the three above.
        maps: the student's feature name -> (H, W) values of at least 0; levels may be missing.
        selects: whether cells of value 0 are left out, not merely low.
        remarks: feature name -> a word on its map.
    """

    title: str
    note: str
    scaling: str
    maps: dict[str, torch.Tensor]
    selects: bool = False
    remarks: dict[str, str] | None = None


def feature_maps(student: Run, teacher: Run | None) -> list[LevelMaps]:
    """Energy and attention of the student's and the teacher's maps of the same strides.

    Args:
        student, teacher: runs of a batch of one image.
    """
    sides = {"student": _by_stride(student)}
    if teacher is not None:
        sides["teacher"] = _by_stride(teacher)
    names = {stride: name for stride, (name, _) in sides["student"].items()}

    def maps(side, compute) -> dict[str, torch.Tensor]:
        common = {stride: feature for stride, (_, feature) in side.items() if stride in names}
        return {names[stride]: compute(feature)[0].cpu() for stride, feature in common.items()}

    energies = [
        LevelMaps(f"{name}: energy", "mean |F| of the channels", OWN_RANGE, maps(side, feature_energy))
        for name, side in sides.items()
    ]
    attentions = [
        LevelMaps(f"{name}: attention", "HW softmax(energy / 0.5)", COMMON, maps(side, spatial_attention))
        for name, side in sides.items()
    ]
    return energies + attentions


def focal_maps(student: Run, attention: LevelMaps | None) -> list[LevelMaps]:
    """FGD's weights of cells: the scale mask of foreground and background, and that times an attention.

    Args:
        student: run of a batch of one image, with ground truth.
        attention: the teacher's, with which FGD weighs errors; None without a teacher.
    """
    scales = {}
    for stride, (name, feature) in _by_stride(student).items():
        foreground, background = focal_masks(student.truth.boxes, student.truth.valid, feature.shape[-2:], stride)
        scales[name] = (foreground + background)[0].cpu()
    maps = [LevelMaps("FGD: scale mask", "1 / cells of box or background", OWN_MAXIMUM, scales)]
    if attention is not None:
        shared = {
            name: scales[name] * seen for name, seen in attention.maps.items() if seen.shape == scales[name].shape
        }
        maps.append(LevelMaps("FGD: weights", "mask x teacher's attention", OWN_MAXIMUM, shared))
    return maps


def region_maps(
    cfg: CfgNode, names: Sequence[str], student: Run, teacher_run: Run | None, teacher: Teacher | None
) -> tuple[list[LevelMaps], list[str]]:
    """Cells that regions select, as the methods compute them.

    Args:
        names: of :data:`SELECTED`.
        student, teacher_run: runs of a batch of one image, with ground truth.
        teacher: whose run ``teacher_run`` is; None without one.

    Returns:
        the maps, and a sentence for each region that this pair does not have.
    """
    maps, missing = [], []
    for name in names:
        try:
            if name == VALUABLE:
                maps.append(_valuable_maps(cfg, student))
            else:
                maps.append(_imitated_maps(cfg, name, student, teacher_run, teacher))
        except UserError as error:
            missing.append(f"{name} is not shown: {error}")
    return maps, missing


def _valuable_maps(cfg: CfgNode, student: Run) -> LevelMaps:
    staged = student.staged
    if staged.family != "dense":
        raise UserError(f"LD's region is one of anchors, and the student is {staged.kind}.")
    region = LD.arguments(cfg.MODEL.DISTILL.LD, staged)["valuable"]
    values = region.values(student, lambda: scores_and_boxes(student)[0].amax(dim=-1))
    value = "weight of each cell" if region.binary else "by class score" if region.inside_box else "by IoU"
    maps = {name: _as_map(student, name, cells[0]) for name, cells in cells_of(student, values).items()}
    return LevelMaps(VALUABLE, f"{SELECTED[VALUABLE]}, {value}", OWN_MAXIMUM, maps, True, _counts(maps))


def _imitated_maps(
    cfg: CfgNode, name: str, student: Run, teacher_run: Run | None, teacher: Teacher | None
) -> LevelMaps:
    if name == "gibox" and teacher_run is None:
        raise UserError("general instances are where student and teacher differ, and there is no teacher.")
    # The student stands in: only general instances ask a teacher.
    asked = teacher or Teacher(student.staged.model, input_format=cfg.INPUT.FORMAT)
    region = build_region(cfg, name, student.staged, asked)
    if name == "gibox":
        _require_same_sizes(student, teacher_run)
    maps, remarks = {}, {}
    for level, (inside, _, positive) in region.cells(student, teacher_run or student).items():
        maps[level] = _as_map(student, level, inside[0].float())
        used = not inside.any() or positive.any()
        remarks[level] = f"{int(inside.sum())} cells" + ("" if used else ", not used")
    return LevelMaps(name, SELECTED[name], OWN_MAXIMUM, maps, True, remarks)


def _require_same_sizes(student: Run, teacher: Run) -> None:
    ours, theirs = ([tuple(x.shape[-2:]) for x in run.features.values()] for run in (student, teacher))
    if ours != theirs:
        raise UserError(f"maps of the student are of sizes {ours}, of the teacher {theirs}.")


def _as_map(run: Run, name: str, cells: torch.Tensor) -> torch.Tensor:
    return cells.view(run.features[name].shape[-2:]).cpu()


def _counts(maps: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{int((values > 0).sum())} cells" for name, values in maps.items()}


def _by_stride(run: Run) -> dict[int, tuple[str, torch.Tensor]]:
    shapes = run.staged.feature_shapes()
    return {shapes[name].stride: (name, feature) for name, feature in run.features.items()}

"""Compares an exported file with the detector that it was made from, in numbers and in time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UserError
from ...evaluation.speed import seconds_in_turns
from .runtime import Exported
from .tracing import reason_of

# Of raw outputs: the largest difference, in parts of the largest value.
RAW_TOLERANCE = 1e-3
# Of detections: the same object if score and corners (in pixels) differ by no more.
SCORE_TOLERANCE = 1e-3
CORNER_TOLERANCE = 0.1
# Scores on either side of the threshold, and overlaps on either side of the suppression's, come from rounding.
MAX_UNMATCHED = 0.02


@dataclass(frozen=True)
class Comparison:
    """One output of all images, or their detections.

    Attributes:
        name: what was compared.
        number: of values or detections in eager mode.
        difference: largest absolute one.
        relative: the same in parts of the largest value.
        remark: for the table.
        accepted: whether it is within the tolerance.
    """

    name: str
    number: int
    difference: float
    relative: float
    remark: str
    accepted: bool


@torch.no_grad()
def compare_outputs(graph: nn.Module, exported: Exported, images: Sequence[torch.Tensor]) -> list[Comparison]:
    """Differences between a graph in eager mode and its file.

    Args:
        graph: what was exported; with "boxes", "scores" and "classes" as detections if the description says so.
        images: batches (N, 3, H, W) uint8.

    Raises:
        UserError: the file cannot be run on one of them.
    """
    names = exported.description["outputs"]
    pairs = []
    for x in images:
        try:
            found = exported(x)
        except Exception as error:  # whatever the two runtimes raise
            size = " x ".join(map(str, x.shape[-2:]))
            raise UserError(f"The exported graph fails on an image of {size} ({reason_of(error)}).") from error
        pairs.append((dict(zip(names, graph(x))), dict(zip(names, found))))
    if exported.description["post_processing"]:
        return [*_compare_detections(pairs)]
    return [
        _compare_values(name, [(eager[name], theirs[name]) for eager, theirs in pairs]) for name in names
    ]


def _compare_values(name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Comparison:
    number = sum(eager.numel() for eager, _ in pairs)
    if any(eager.shape != theirs.shape for eager, theirs in pairs):
        return Comparison(name, number, float("inf"), float("inf"), "other shapes", False)
    difference = max(float((eager - theirs).abs().max()) for eager, theirs in pairs)
    relative = difference / max(max(float(eager.abs().max()) for eager, _ in pairs), 1e-12)
    return Comparison(name, number, difference, relative, "", relative <= RAW_TOLERANCE)


def _compare_detections(pairs: Sequence[tuple[dict, dict]]) -> list[Comparison]:
    number = matched = 0
    corners, scores, largest = 0.0, 0.0, 1e-12
    for eager, theirs in pairs:
        first, second = match(eager, theirs)
        number += max(len(eager["scores"]), len(theirs["scores"]))
        matched += len(first)
        if len(first):
            corners = max(corners, float((eager["boxes"][first] - theirs["boxes"][second]).abs().max()))
            scores = max(scores, float((eager["scores"][first] - theirs["scores"][second]).abs().max()))
            largest = max(largest, float(eager["boxes"].abs().max()))
    accepted = number - matched <= MAX_UNMATCHED * number
    remark = f"{matched} of {number} match"
    return [
        Comparison("boxes (pixels)", number, corners, corners / largest, remark, accepted),
        Comparison("scores", number, scores, scores, remark, accepted),
    ]


def match(eager: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the detections of one image that are the same on both sides, a pair each.

    Of the same class, and within the tolerances in score and corners.
    """
    same = eager["classes"][:, None] == theirs["classes"]
    same &= (eager["scores"][:, None] - theirs["scores"]).abs() <= SCORE_TOLERANCE
    same &= (eager["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1) <= CORNER_TOLERANCE
    pairs: dict[int, int] = {}
    for row, column in same.nonzero().tolist():
        if row not in pairs and column not in pairs.values():
            pairs[row] = column
    indices = torch.tensor(list(pairs.items()), dtype=torch.int64).reshape(-1, 2)
    return indices[:, 0], indices[:, 1]


def milliseconds(
    graph: nn.Module, exported: Exported, image: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Medians of both on one image; they take turns."""
    with torch.no_grad():
        seconds = seconds_in_turns(
            {"eager": lambda: graph(image), "exported": lambda: exported(image)}, warmup=2, rounds=rounds
        )
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}

"""The assigners as detectors hold them: their options bound, one call for all.

An :class:`Assigner` takes the :class:`~d2_distill.boxes.anchor_grid.AnchorGrid` and the :class:`GroundTruth` of a
batch, and may look at what the detector predicts. Anchors that the grid calls invalid are not matched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Protocol

import torch

from ..boxes.anchor_grid import AnchorGrid
from .assignment import Match
from .atss import match_atss
from .ground_truth import GroundTruth
from .max_iou import match_max_iou
from .points import match_points
from .task_aligned import match_task_aligned


@dataclass(frozen=True)
class Predicted:
    """What a detector predicts for the R anchors of a batch, without gradient; computed if an assigner asks.

    Attributes:
        scores: gives (N, R, num_classes) class probabilities.
        boxes: gives (N, R, 4) XYXY in pixels.
    """

    scores: Callable[[], torch.Tensor]
    boxes: Callable[[], torch.Tensor]


class Assigner(Protocol):
    """
    Attributes:
        assigns_points: whether locations are assigned by where they lie in a box, not by anchors.
        reads_predictions: whether the match depends on what is predicted.
    """

    assigns_points: bool
    reads_predictions: bool

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match: ...


@dataclass(frozen=True)
class ATSSAssigner:
    """:func:`match_atss` with ``topk`` candidates a level."""

    topk: int
    assigns_points = False
    reads_predictions = False

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match:
        found = match_atss(grid.boxes, grid.level_sizes, truth.boxes, truth.valid, grid.valid, topk=self.topk)
        return Match(found.matches, thresholds=found.thresholds)


@dataclass(frozen=True)
class PointAssigner:
    """:func:`match_points` of the anchors' centers.

    Attributes:
        size_thresholds: bounds, in pixels, between the sizes that neighboring levels are made for.
        center_sampling_radius: in strides; 0 takes the whole box.
    """

    size_thresholds: tuple[float, ...]
    center_sampling_radius: float
    assigns_points = True
    reads_predictions = False

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match:
        bounds = [-1.0, *self.size_thresholds, math.inf]
        ranges = torch.stack([grid.per_anchor(bounds[:-1]), grid.per_anchor(bounds[1:])], dim=1)
        return Match(
            match_points(
                grid.centers,
                grid.stride,
                ranges,
                truth.boxes,
                truth.valid,
                center_sampling_radius=self.center_sampling_radius,
            )
        )


@dataclass(frozen=True)
class MaxIoUAssigner:
    """:func:`match_max_iou`.

    Attributes:
        thresholds, labels: as in ``MODEL.RETINANET.IOU_THRESHOLDS`` and ``IOU_LABELS``.
    """

    thresholds: tuple[float, ...]
    labels: tuple[int, ...]
    assigns_points = False
    reads_predictions = False

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match:
        return Match(
            match_max_iou(
                grid.boxes, truth.boxes, truth.valid, grid.valid, thresholds=self.thresholds, labels=self.labels
            )
        )


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """:func:`match_task_aligned` with its options."""

    topk: int
    alpha: float
    beta: float
    assigns_points = False
    reads_predictions = True

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match:
        found = match_task_aligned(
            predicted.scores(),
            predicted.boxes(),
            grid.boxes,
            truth.boxes,
            truth.classes,
            truth.valid,
            grid.valid,
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
        )
        return Match(found.matches, scores=found.scores)

"""The assigners as detectors hold them: their options bound, one call for all.

``assigner(anchors, level_sizes, strides, truth, valid_anchors)`` takes the (R, 4) XYXY anchors of all levels,
the number of anchors and the stride of each level, the batch's :class:`GroundTruth` and (N, R) bool, False for
anchors that must not be matched (None: all may). It returns (N, R) int64: index of the ground-truth box,
``BACKGROUND`` or ``IGNORED``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..boxes.geometry import centers_of
from .atss import match_atss
from .ground_truth import GroundTruth
from .max_iou import match_max_iou
from .points import match_points


@dataclass(frozen=True)
class ATSSAssigner:
    """:func:`match_atss` with ``topk`` candidates a level."""

    topk: int

    def __call__(
        self,
        anchors: torch.Tensor,
        level_sizes: Sequence[int],
        strides: Sequence[int],
        truth: GroundTruth,
        valid_anchors: torch.Tensor | None,
    ) -> torch.Tensor:
        return match_atss(
            anchors, level_sizes, truth.boxes, truth.valid, valid_anchors, topk=self.topk
        ).matches


@dataclass(frozen=True)
class PointAssigner:
    """:func:`match_points` of the anchors' centres.

    Attributes:
        size_thresholds: bounds, in pixels, between the sizes that neighbouring levels are made for.
        center_sampling_radius: in strides; 0 takes the whole box.
    """

    size_thresholds: tuple[float, ...]
    center_sampling_radius: float

    def __call__(
        self,
        anchors: torch.Tensor,
        level_sizes: Sequence[int],
        strides: Sequence[int],
        truth: GroundTruth,
        valid_anchors: torch.Tensor | None,
    ) -> torch.Tensor:
        bounds = anchors.new_tensor([-1.0, *self.size_thresholds, math.inf])
        of_level = torch.arange(len(level_sizes), device=anchors.device).repeat_interleave(
            torch.tensor(level_sizes, device=anchors.device)
        )
        return match_points(
            centers_of(anchors),
            anchors.new_tensor(strides)[of_level],
            torch.stack([bounds[:-1], bounds[1:]], dim=1)[of_level],
            truth.boxes,
            truth.valid,
            center_sampling_radius=self.center_sampling_radius,
        )


@dataclass(frozen=True)
class MaxIoUAssigner:
    """:func:`match_max_iou`.

    Attributes:
        thresholds, labels: as in ``MODEL.RETINANET.IOU_THRESHOLDS`` and ``IOU_LABELS``.
    """

    thresholds: tuple[float, ...]
    labels: tuple[int, ...]

    def __call__(
        self,
        anchors: torch.Tensor,
        level_sizes: Sequence[int],
        strides: Sequence[int],
        truth: GroundTruth,
        valid_anchors: torch.Tensor | None,
    ) -> torch.Tensor:
        return match_max_iou(
            anchors, truth.boxes, truth.valid, valid_anchors, thresholds=self.thresholds, labels=self.labels
        )

"""Adaptive training sample selection (Zhang et al., arXiv 1912.02424), for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..boxes.chunks import box_chunks
from ..boxes.geometry import centers_of, depth_inside
from ..boxes.overlaps import pairwise_overlaps
from .claims import MIN_DEPTH, settle_claims


class ATSSMatch(NamedTuple):
    """
    Attributes:
        matches: (N, R) int64, index of the box that an anchor is positive for, or BACKGROUND.
        thresholds: (N, G) IoU from which on a candidate is positive; of use for real boxes only.
    """

    matches: torch.Tensor
    thresholds: torch.Tensor


class _Candidates(NamedTuple):
    """The K anchors nearest to each box, (N, G, K); fewer where ``real`` is False. Their IoU there is 0."""

    anchors: torch.Tensor
    overlaps: torch.Tensor
    real: torch.Tensor


def match_atss(
    anchors: torch.Tensor,
    level_sizes: Sequence[int],
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    topk: int = 9,
) -> ATSSMatch:
    """Match anchors with boxes.

    The candidates of a box are the ``topk`` valid anchors of each level whose centres are nearest to its own,
    its threshold is the mean of their IoU plus the standard deviation (unbiased; 0 of a single candidate).
    Candidates that reach it and have their centre inside the box are positive; one that is positive for
    several boxes goes to that of the largest IoU, of equal ones to the first. A box may get no anchor at all.

    Args:
        anchors: (R, 4) XYXY of all levels.
        level_sizes: number of anchors of each level.
        boxes: (N, G, 4) XYXY, padded.
        valid_boxes: (N, G) bool.
        valid_anchors: (N, R) bool, the anchors that take part; None: all.
        topk: candidates a level.
    """
    candidates = _nearest_anchors(anchors, level_sizes, boxes, valid_boxes, valid_anchors, topk)
    thresholds = _thresholds(candidates)
    depths = depth_inside(centers_of(anchors)[candidates.anchors], boxes[:, :, None])
    positive = candidates.real & valid_boxes[..., None]
    positive &= (candidates.overlaps >= thresholds[..., None]) & (depths > MIN_DEPTH)
    matches = settle_claims(candidates.anchors, candidates.overlaps, positive, len(anchors))
    return ATSSMatch(matches, thresholds)


def atss_thresholds(
    anchors: torch.Tensor,
    level_sizes: Sequence[int],
    boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    topk: int = 9,
    valid_boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the thresholds (N, G) of :func:`match_atss` alone, for detectors that assign otherwise.

    Without ``valid_boxes`` padding counts as boxes, which takes longer if an image has many boxes.
    """
    if valid_boxes is None:
        valid_boxes = torch.ones_like(boxes[..., 0], dtype=torch.bool)
    return _thresholds(_nearest_anchors(anchors, level_sizes, boxes, valid_boxes, valid_anchors, topk))


def _nearest_anchors(
    anchors: torch.Tensor,
    level_sizes: Sequence[int],
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None,
    topk: int,
) -> _Candidates:
    num_candidates = sum(min(topk, size) for size in level_sizes)
    real = torch.zeros(*valid_boxes.shape, num_candidates, dtype=torch.bool, device=boxes.device)
    index = torch.zeros_like(real, dtype=torch.int64)
    box_centers, anchor_centers = centers_of(boxes), centers_of(anchors)
    for images, some in box_chunks(valid_boxes, len(anchors)):
        # The form by matrix multiplication would be off by whole pixels on large images.
        distances = torch.cdist(box_centers[images, some], anchor_centers, compute_mode="donot_use_mm_for_euclid_dist")
        if valid_anchors is not None:
            distances.masked_fill_(~valid_anchors[images, None], float("inf"))
        start = 0
        nearest, indices = [], []
        for level in distances.split(list(level_sizes), dim=-1):
            values, inside_level = level.topk(min(topk, level.shape[-1]), largest=False, sorted=False)
            nearest.append(values)
            indices.append(inside_level + start)
            start += level.shape[-1]
        real[images, some] = torch.cat(nearest, dim=-1).isfinite()
        index[images, some] = torch.cat(indices, dim=-1)
    overlaps = pairwise_overlaps(anchors[index], boxes[:, :, None]).squeeze(-1)
    return _Candidates(index, overlaps.masked_fill(~real, 0), real)


def _thresholds(candidates: _Candidates) -> torch.Tensor:
    count = candidates.real.sum(dim=-1)
    mean = candidates.overlaps.sum(dim=-1) / count.clamp(min=1)
    deviations = (candidates.overlaps - mean[..., None]).masked_fill(~candidates.real, 0)
    return mean + (deviations.square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()

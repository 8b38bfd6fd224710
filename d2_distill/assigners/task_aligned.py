"""Task-aligned assignment (TOOD, Feng et al., ICCV 2021, arXiv 2108.07755), for a whole batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..boxes.chunks import box_chunks
from ..boxes.geometry import centers_of, depth_inside
from ..boxes.overlaps import pairwise_overlaps
from .claims import MIN_DEPTH, settle_claims

EPS = 1e-7  # added to the largest alignment of a box (the released code's)


class TaskAlignedMatch(NamedTuple):
    """
    Attributes:
        matches: (N, R) int64, index of the box that an anchor is positive for, or BACKGROUND.
        scores: (N, R) class score that each positive anchor should reach; 0 elsewhere.
    """

    matches: torch.Tensor
    scores: torch.Tensor


def match_task_aligned(
    scores: torch.Tensor,
    predicted: torch.Tensor,
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    classes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    *,
    topk: int,
    alpha: float,
    beta: float,
) -> TaskAlignedMatch:
    """Match anchors with the boxes that they predict best.

    How well an anchor is aligned with a box is s^alpha * u^beta, with s its score of the box's class and u the IoU of
    its predicted box. Of the ``topk`` valid anchors that are aligned best, those are positive whose alignment is above
    0 and whose center lies inside the box; one that is positive for several boxes goes to that of the largest IoU, of
    equal ones to the first. The targets of a box's anchors are their alignments, scaled such that the largest is the
    largest IoU among them. A box may get no anchor at all.

    Args:
        scores: (N, R, K) predicted class probabilities, without gradient.
        predicted: (N, R, 4) predicted boxes, XYXY.
        anchors: (R, 4) XYXY of all levels.
        boxes: (N, G, 4) XYXY, padded; G may be 0.
        classes: (N, G) int64.
        valid_boxes: (N, G) bool.
        valid_anchors: (N, R) bool, the anchors that take part; None: all.
        topk: candidates of a box, of all levels together.
        alpha, beta: exponents.
    """
    size = (*valid_boxes.shape, min(topk, len(anchors)))
    alignment, overlaps = (scores.new_zeros(size) for _ in range(2))
    candidates = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for images, some in box_chunks(valid_boxes, len(anchors)):
        rows = classes[images, some, None].expand(-1, -1, len(anchors))
        aligned = scores[images].transpose(1, 2).gather(1, rows).pow(alpha)
        overlap = pairwise_overlaps(boxes[images, some], predicted[images])
        aligned *= overlap.pow(beta)
        aligned.masked_fill_(~valid_boxes[images, some, None], 0)
        if valid_anchors is not None:
            aligned.masked_fill_(~valid_anchors[images, None], 0)
        alignment[images, some], candidates[images, some] = best = aligned.topk(size[-1], dim=-1)
        overlaps[images, some] = overlap.gather(-1, best.indices)
    inside = depth_inside(centers_of(anchors)[candidates], boxes[:, :, None]) > MIN_DEPTH
    matches = settle_claims(candidates, overlaps, (alignment > 0) & inside, len(anchors))

    order = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    kept = matches.gather(1, candidates.flatten(1)).view_as(candidates) == order
    alignment, overlaps = alignment * kept, overlaps * kept
    targets = alignment / (alignment.amax(dim=-1, keepdim=True) + EPS) * overlaps.amax(dim=-1, keepdim=True)
    # One box at most has kept an anchor; the others add 0.
    targets = targets.new_zeros(matches.shape).scatter_add(1, candidates.flatten(1), targets.flatten(1))
    return TaskAlignedMatch(matches, targets)

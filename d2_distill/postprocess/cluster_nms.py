"""Cluster-NMS: greedy suppression as the fixed point of an iteration, with distance-IoU and voting."""

from __future__ import annotations

import torch

from ..boxes.geometry import centers_of
from ..boxes.overlaps import pairwise_overlaps

# Published constants of the distance penalty and of score voting.
DISTANCE_EXPONENT = 0.8
VOTING_OVERLAP = 0.7
VOTING_SIGMA = 0.025


def cluster_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    iou_threshold: float,
    *,
    overlap: str = "diou",
    voting: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class-aware NMS (Zheng et al., arXiv 2005.03572), and voting of the suppressed boxes.

    Boxes are taken in descending order of score; i < j of one class overlap by X_ij, and j is suppressed if
    X_ij > ``iou_threshold`` for a kept i. That keeps exactly what a greedy loop keeps. Then, with sums
    over all j >= i of i's class, suppressed or not, and w_ii = s_i:

        box_i = sum_j w_ij box_j / sum_j w_ij
        "score":    w_ij = exp(-(1 - X_ij)^2 / 0.025) s_j   where X_ij > 0.7
        "weighted": w_ij = IoU_ij s_j                       where X_ij > iou_threshold

    Args:
        boxes: (n, 4) XYXY in pixels; those without area overlap nothing.
        scores: (n,).
        classes: (n,) integers; boxes of different classes have nothing to do with each other.
        iou_threshold: on X.
        overlap: "iou", or "diou": X = IoU - (rho^2 / c^2)^0.8, with rho the distance of the centres and c the
            diagonal of the smallest enclosing box.
        voting: "none" (boxes stay as they are), "score" or "weighted".

    Returns:
        (k,) indices of the kept boxes, best first, and their (k, 4) boxes.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    iou = pairwise_overlaps(boxes, boxes)
    # X is at most the IoU, so that the few pairs of sufficient IoU are all that can suppress or vote.
    sufficient = (iou > min(iou_threshold, VOTING_OVERLAP)) & (classes[:, None] == classes)
    first, second = sufficient.triu(diagonal=1).nonzero(as_tuple=True)
    iou = overlaps = iou[first, second]
    if overlap == "diou":
        overlaps = iou - _relative_distance(boxes[first], boxes[second]) ** DISTANCE_EXPONENT
    suppresses = overlaps > iou_threshold
    kept = _greedily_kept(len(boxes), first[suppresses], second[suppresses])
    if voting == "score":
        weights = torch.exp(-((1 - overlaps) ** 2) / VOTING_SIGMA) * (overlaps > VOTING_OVERLAP)
        boxes = _voted(boxes, scores, first, second, weights)
    elif voting == "weighted":
        boxes = _voted(boxes, scores, first, second, iou * suppresses)
    return order[kept], boxes[kept]


def _relative_distance(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """(P,) rho^2 / c^2 of each pair of (P, 4) boxes."""
    diagonal = boxes1[:, 2:].maximum(boxes2[:, 2:]) - boxes1[:, :2].minimum(boxes2[:, :2])
    offset = centers_of(boxes1) - centers_of(boxes2)
    return offset.square().sum(dim=1) / (diagonal.square().sum(dim=1) + 1e-7)


def _greedily_kept(num_boxes: int, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(n,) bool: what greedy NMS keeps, if box ``first[p]`` suppresses ``second[p]``, which is behind it.

    Round t settles at least the first t boxes, so that the iteration ends; in practice after a few rounds.
    """
    kept = first.new_ones(num_boxes, dtype=torch.bool)
    while True:
        update = torch.ones_like(kept)
        update[second[kept[first]]] = False
        if torch.equal(update, kept):
            return kept
        kept = update


def _voted(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """(n, 4) means: ``second[p]`` votes on ``first[p]`` with ``weights[p]`` times its score, and each box on
    itself with its score.
    """
    # In float64 a box that nobody else votes on stays itself; a score of 0 must leave it one vote.
    scores = scores.double().clamp(min=torch.finfo(torch.float32).tiny)
    weighted = torch.cat([boxes.double(), boxes.new_ones(len(boxes), 1).double()], dim=1) * scores[:, None]
    sums = weighted.index_add(0, first, weights.double()[:, None] * weighted[second])
    return (sums[:, :4] / sums[:, 4:]).to(boxes.dtype)

"""Cluster-NMS: greedy suppression as the fixed point of an iteration, with distance-IoU and voting."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..boxes.geometry import centers_of
from ..boxes.overlaps import pairwise_overlaps

# Published constants of the distance penalty and of score voting.
DISTANCE_EXPONENT = 0.8
VOTING_OVERLAP = 0.7
VOTING_SIGMA = 0.025

# Pairs of boxes that are compared at once. If all overlap, each takes up to 200 bytes, in total 200 MiB.
MAX_PAIRS = 2**20


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
    by_score = scores.argsort(descending=True, stable=True)
    by_class = classes[by_score].argsort(stable=True)  # each class best first
    order = by_score[by_class]
    boxes, classes = boxes[order], classes[order]
    votes = _Votes(boxes, scores[order]) if voting != "none" else None
    kept = torch.ones_like(order, dtype=torch.bool)
    places = torch.arange(len(order), device=order.device)
    for rows, columns in _blocks(classes):
        # A box that earlier blocks suppress neither suppresses others nor is returned.
        rows = places[rows][kept[rows]]
        iou = pairwise_overlaps(boxes[rows], boxes[columns])
        # X is at most the IoU, so that the few pairs of sufficient IoU are all that can suppress or vote.
        first, second = (iou > min(iou_threshold, VOTING_OVERLAP)).nonzero(as_tuple=True)
        iou = iou[first, second]
        first, second = rows[first], second + columns.start
        behind = ((first < second) & (classes[first] == classes[second])).nonzero().squeeze(dim=1)
        first, second, iou = first[behind], second[behind], iou[behind]
        overlaps = iou
        if overlap == "diou":
            overlaps = iou - _relative_distance(boxes[first], boxes[second]) ** DISTANCE_EXPONENT
        suppresses = overlaps > iou_threshold
        kept = _greedily_kept(kept, first[suppresses], second[suppresses])
        if votes is not None:
            heard = kept[first].nonzero().squeeze(dim=1)
            weights = _weights(iou[heard], overlaps[heard], iou_threshold, voting)
            votes.add(first[heard], second[heard], weights)
    if votes is not None:
        boxes = votes.means()
    ranks, best_first = by_class[kept].sort()
    return by_score[ranks], boxes[kept][best_first]


def _blocks(classes: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the rows and of the columns of all pairs, of at most :data:`MAX_PAIRS` (or one row) each.

    The columns reach from the first of the rows to the end of the last one's class, in ascending ``classes``.
    """
    if len(classes) ** 2 <= MAX_PAIRS:
        yield slice(0, len(classes)), slice(0, len(classes))
        return
    ends = torch.searchsorted(classes, classes, right=True).tolist()
    start = 0
    for stop, end in enumerate(ends[1:], start=1):
        if (stop + 1 - start) * (end - start) > MAX_PAIRS:
            yield slice(start, stop), slice(start, ends[stop - 1])
            start = stop
    yield slice(start, len(ends)), slice(start, len(ends))


def _relative_distance(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """(P,) rho^2 / c^2 of each pair of (P, 4) boxes."""
    diagonal = boxes1[:, 2:].maximum(boxes2[:, 2:]) - boxes1[:, :2].minimum(boxes2[:, :2])
    offset = centers_of(boxes1) - centers_of(boxes2)
    return offset.square().sum(dim=1) / (diagonal.square().sum(dim=1) + 1e-7)


def _greedily_kept(candidates: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return which boxes greedy NMS keeps.

    Args:
        candidates: (n,) bool, the others are suppressed already.
        first, second: (P,) indices; ``first[p]`` suppresses ``second[p]``, which comes after it.

    Returns:
        (n,) bool.

    Round t settles at least the first t boxes, so that the iteration ends; in practice after a few rounds.
    """
    kept = candidates
    while True:
        update = candidates.clone()
        update[second[kept[first]]] = False
        if torch.equal(update, kept):
            return kept
        kept = update


def _weights(iou: torch.Tensor, overlaps: torch.Tensor, iou_threshold: float, voting: str) -> torch.Tensor:
    """Return w_ij / s_j of P pairs, (P,), from their IoU and their X_ij ``overlaps``, (P,) each."""
    if voting == "score":
        return torch.exp(-((1 - overlaps) ** 2) / VOTING_SIGMA) * (overlaps > VOTING_OVERLAP)
    return iou * (overlaps > iou_threshold)


class _Votes:
    """Sums of votes on boxes: each box votes on itself with its score.

    Args:
        boxes: (n, 4).
        scores: (n,).
    """

    def __init__(self, boxes: torch.Tensor, scores: torch.Tensor):
        # In float64 a box that nobody else votes on stays itself; a score of 0 must leave it one vote.
        scores = scores.double().clamp(min=torch.finfo(torch.float32).tiny)
        ones = boxes.new_ones(len(boxes), 1)
        self.weighted = torch.cat([boxes, ones], dim=1).double() * scores[:, None]
        self.sums = self.weighted.clone()
        self.dtype = boxes.dtype

    def add(self, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor) -> None:
        """Let ``second[p]`` vote on ``first[p]`` with ``weights[p]`` times its score."""
        self.sums.index_add_(0, first, weights.double()[:, None] * self.weighted[second])

    def means(self) -> torch.Tensor:
        """Return the (n, 4) voted boxes."""
        return (self.sums[:, :4] / self.sums[:, 4:]).to(self.dtype)

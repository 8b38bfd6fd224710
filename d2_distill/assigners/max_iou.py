"""RetinaNet's assignment by the highest IoU, in OpenMMLab's convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..boxes.chunks import reduce_over_boxes
from ..boxes.overlaps import pairwise_overlaps
from .assignment import BACKGROUND, IGNORED


def match_max_iou(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    *,
    thresholds: Sequence[float],
    labels: Sequence[int],
) -> torch.Tensor:
    """Give each anchor the box that it overlaps most, then each box the anchors that overlap it most.

    Detectron2's ``allow_low_quality_matches`` only makes such an anchor positive and leaves it with the box
    that it overlaps most itself; here it is re-assigned, as in the RetinaNets that published distillation
    numbers are of.

    Args:
        anchors: (R, 4) XYXY.
        boxes: (N, G, 4) XYXY of N images, padded; G may be 0.
        valid_boxes: (N, G) bool, False where padded.
        valid_anchors: (N, R) bool, the others overlap nothing; None: all are valid.
        thresholds, labels: of Detectron2's Matcher: ``labels[i]`` (1 positive, 0 negative, -1 ignored) holds
            from IoU ``thresholds[i - 1]`` on.

    Returns:
        (N, R) int64: index of the box, BACKGROUND or IGNORED.
    """
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), len(anchors)), BACKGROUND, device=anchors.device)
    numbers = torch.arange(1, boxes.shape[1] + 1, dtype=torch.int32, device=boxes.device)

    def find(images: slice, some: slice) -> _Found:
        overlaps = pairwise_overlaps(boxes[images, some], anchors)
        overlaps.masked_fill_(~valid_boxes[images, some, None], 0)
        if valid_anchors is not None:
            overlaps.masked_fill_(~valid_anchors[images, None], 0)
        best, nearest = overlaps.max(dim=1)
        return _Found(best, nearest.add_(some.start), claimants(overlaps, numbers[some]))

    best, matches, claimant = reduce_over_boxes(find, _Found.combined, valid_boxes, len(anchors))
    label = torch.full_like(matches, labels[0])
    for threshold, above in zip(thresholds, labels[1:]):  # ascending; numbers, which need no upload to a GPU
        label = label.masked_fill(best >= threshold, above)
    matches = matches.masked_fill(label == 0, BACKGROUND).masked_fill(label == -1, IGNORED)
    return torch.where(claimant > 0, claimant - 1, matches)


class _Found(NamedTuple):
    """What some boxes of each image are to its anchors, (N, R) each.

    Attributes:
        best: highest IoU.
        matches: index of the first box that attains it.
        claimant: number of the last box that claims the anchor, counted from 1; 0: nobody.
    """

    best: torch.Tensor
    matches: torch.Tensor
    claimant: torch.Tensor

    def combined(self, later: _Found) -> _Found:
        """Return the result of these boxes and of the ``later`` ones together."""
        better = later.best > self.best
        return _Found(
            later.best.where(better, self.best),
            later.matches.where(better, self.matches),
            later.claimant.maximum(self.claimant),
        )


def claimants(overlaps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return which box claims each anchor: a box claims all anchors that attain its highest IoU.

    An anchor that several boxes claim goes to the last of them. A box that overlaps no anchor claims none;
    the reference lets it grab every anchor that it does not touch.

    Args:
        overlaps: (N, G, R) IoU of G > 0 boxes with R anchors.
        numbers: (G,) positive number of each box, ascending.

    Returns:
        (N, R) int64, number of the box; 0: none.
    """
    highest = overlaps.amax(dim=2, keepdim=True)
    claims = (overlaps == highest) & (highest > 0)
    return (claims * numbers[:, None]).amax(dim=1).long()

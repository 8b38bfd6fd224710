"""The valuable localisation region of LD (Zheng et al., arXiv 2102.12252): anchors around the positives."""

from __future__ import annotations

import torch

from ..boxes.chunks import reduce_over_boxes
from ..boxes.overlaps import pairwise_overlaps

# Name of an overlap -> mode of pairwise_overlaps: the released code's, and the paper's DIoU.
VALUABLE_OVERLAPS = {"iof": "iof_diou", "union": "diou"}


def valuable_region(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    thresholds: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    gamma: float = 0.25,
    overlap: str = "iof",
) -> torch.Tensor:
    """How valuable each anchor is for localisation.

    An anchor is in the region of a box if its overlap D is in [gamma * t, t), where t is the box's ATSS
    threshold. Its value is the largest IoU with the boxes in whose region it is. As the threshold is one of
    IoU and not of D, anchors may be in the region and positive.

    Args:
        anchors: (R, 4) XYXY of all levels.
        boxes: (N, G, 4) XYXY, padded.
        valid_boxes: (N, G) bool.
        thresholds: (N, G), from :func:`~d2_distill.assigners.match_atss`.
        valid_anchors: (N, R) bool, the anchors that take part; None: all.
        gamma: lower end of the region as a part of the threshold.
        overlap: D is the distance-IoU ("union", the paper), or that with the anchor's area in place of the
            union ("iof", the released code).

    Returns:
        (N, R) value in [0, 1]; 0 outside the region.
    """
    if not boxes.shape[1]:
        return anchors.new_zeros(len(boxes), len(anchors))

    def values(images: slice, some: slice) -> torch.Tensor:
        # As (N, G, R, 1): with the many anchors innermost it is several times faster than as (N, R, G).
        these = boxes[images, some, None]
        distance_overlaps = pairwise_overlaps(anchors, these, VALUABLE_OVERLAPS[overlap]).squeeze(-1)
        upper = thresholds[images, some, None]
        valuable = (distance_overlaps >= gamma * upper) & (distance_overlaps < upper)
        valuable &= valid_boxes[images, some, None]
        if valid_anchors is not None:
            valuable &= valid_anchors[images, None]
        return pairwise_overlaps(anchors, these).squeeze(-1).masked_fill_(~valuable, 0).amax(dim=1)

    return reduce_over_boxes(values, torch.maximum, valid_boxes, len(anchors))

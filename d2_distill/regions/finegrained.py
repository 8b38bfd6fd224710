"""Anchors near objects: the region of fine-grained feature imitation (Wang et al., arXiv 1906.03609)."""

from __future__ import annotations

import torch

from ..boxes.chunks import reduce_over_boxes
from ..boxes.overlaps import pairwise_overlaps


def finegrained_region(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    factor: float = 0.5,
) -> torch.Tensor:
    """Anchors whose IoU with some box exceeds ``factor`` times the largest that the box has with any anchor.

    Args:
        anchors: (R, 4) XYXY of all levels.
        boxes: (N, G, 4) XYXY, padded.
        valid_boxes: (N, G) bool.
        valid_anchors: (N, R) bool, the anchors that take part; None: all.
        factor: part of the largest IoU.

    Returns:
        (N, R) bool. A box that touches no anchor adds none.
    """

    def near(images: slice, some: slice) -> torch.Tensor:
        overlaps = pairwise_overlaps(boxes[images, some], anchors)
        if valid_anchors is not None:
            overlaps.masked_fill_(~valid_anchors[images, None], 0)
        near_box = overlaps > factor * overlaps.amax(dim=-1, keepdim=True)
        return (near_box & valid_boxes[images, some, None]).any(dim=1)

    return reduce_over_boxes(near, torch.logical_or, valid_boxes, len(anchors))

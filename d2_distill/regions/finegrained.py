"""Anchors near objects: the region of fine-grained feature imitation (Wang et al., arXiv 1906.03609)."""

from __future__ import annotations

import torch

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
    overlaps = pairwise_overlaps(boxes, anchors)
    if valid_anchors is not None:
        overlaps = overlaps.masked_fill(~valid_anchors[:, None], 0)
    near = overlaps > factor * overlaps.amax(dim=-1, keepdim=True)
    return (near & valid_boxes[..., None]).any(dim=1)

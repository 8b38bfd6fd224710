"""Locations inside objects."""

from __future__ import annotations

import torch

from ..boxes.chunks import reduce_over_boxes
from ..boxes.geometry import depth_inside


def inside_boxes(points: torch.Tensor, boxes: torch.Tensor, valid_boxes: torch.Tensor) -> torch.Tensor:
    """Points strictly inside any box of their image.

    Args:
        points: (R, 2) XY in pixels.
        boxes: (N, G, 4) XYXY, padded.
        valid_boxes: (N, G) bool.

    Returns:
        (N, R) bool.
    """

    def inside(images: slice, some: slice) -> torch.Tensor:
        depths = depth_inside(points, boxes[images, some, None])
        return ((depths > 0) & valid_boxes[images, some, None]).any(dim=1)

    return reduce_over_boxes(inside, torch.logical_or, valid_boxes, len(points))

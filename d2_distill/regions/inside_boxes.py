"""Locations inside objects."""

from __future__ import annotations

import torch

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
    return ((depth_inside(points, boxes[:, :, None]) > 0) & valid_boxes[..., None]).any(dim=1)

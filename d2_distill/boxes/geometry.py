"""Points of boxes, points in boxes, and distances between them."""

from __future__ import annotations

import torch


def centers_of(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) XYXY to (..., 2) XY."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def depth_inside(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Distance from a point to the nearest of the lines that a box's sides lie on, negative outside.

    Args:
        points: (..., 2) XY.
        boxes: (..., 4) XYXY; leading dimensions are broadcast.

    Returns:
        (...) pixels.
    """
    x, y = points.unbind(dim=-1)
    left, top, right, bottom = boxes.unbind(dim=-1)
    return (x - left).minimum(right - x).minimum((y - top).minimum(bottom - y))


def boxes_from_distances(points: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Points (..., 2) and distances (..., 4) to the left, top, right and bottom give XYXY boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def distances_to_sides(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) left, top, right, bottom; negative where a point (..., 2) lies outside its box (..., 4)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)

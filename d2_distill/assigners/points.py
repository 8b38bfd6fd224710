"""FCOS assignment (Tian et al., arXiv 1904.01355): points inside boxes, each level its range of sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..boxes.chunks import reduce_over_boxes
from .assignment import BACKGROUND


def match_points(
    points: torch.Tensor,
    strides: torch.Tensor,
    size_ranges: torch.Tensor,
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    center_sampling_radius: float = 0.0,
) -> torch.Tensor:
    """Match points with boxes.

    A point fits a box if it lies strictly inside and the distance to the farthest side is in the point's
    range, both ends included; of several such boxes it takes the one of the smallest area, of equal ones the
    first.

    Args:
        points: (R, 2) XY of all levels, in pixels.
        strides: (R,) pixels a cell at each point.
        size_ranges: (R, 2) smallest and largest distance in pixels; the last level's end is inf.
        boxes: (N, G, 4) XYXY, padded.
        valid_boxes: (N, G) bool.
        center_sampling_radius: if positive, the point must also lie strictly inside the square around the
            box's centre that reaches this many strides to each side.

    Returns:
        (N, R) int64, index of the box, or BACKGROUND.
    """
    num_images, num_boxes, _ = boxes.shape
    if not num_boxes:
        return torch.full((num_images, len(points)), BACKGROUND, device=points.device)
    # With the boxes in the order of their areas, the first that a point fits is the one that it takes.
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).masked_fill(~valid_boxes, float("inf"))
    order = areas.argsort(dim=1, stable=True)
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))[:, :, None]
    valid_boxes = valid_boxes.gather(1, order)
    ranks = torch.arange(num_boxes, dtype=torch.int32, device=boxes.device)[:, None]
    x, y = points.unbind(dim=-1)
    reach = center_sampling_radius * strides

    def first_fit(images: slice, some: slice) -> torch.Tensor:
        left, top, right, bottom = boxes[images, some].unbind(dim=-1)  # (n, g, 1) each
        farthest = (x - left).maximum(right - x).maximum((y - top).maximum(bottom - y))
        fits = (farthest >= size_ranges[:, 0]) & (farthest <= size_ranges[:, 1])
        fits &= valid_boxes[images, some, None]
        del farthest
        for position, start, end in (x, left, right), (y, top, bottom):
            if center_sampling_radius > 0:
                center = (start + end) / 2
                start, end = start.maximum(center - reach), end.minimum(center + reach)
            fits &= (position > start) & (position < end)
        return ranks[some].where(fits, num_boxes).amin(dim=1)

    first = reduce_over_boxes(first_fit, torch.minimum, valid_boxes, len(points)).long()
    return F.pad(order, (0, 1), value=BACKGROUND).gather(1, first)

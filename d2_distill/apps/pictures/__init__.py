"""Pictures for people: boxes on images, and figures of several panels."""

from __future__ import annotations

from .boxes import class_color, draw_boxes, enlarged, ground_truth, name_of
from .detections import draw_detections, side_by_side
from .files import write_picture
from .panels import new_figure

__all__ = [
    "class_color",
    "draw_boxes",
    "draw_detections",
    "enlarged",
    "ground_truth",
    "name_of",
    "new_figure",
    "side_by_side",
    "write_picture",
]

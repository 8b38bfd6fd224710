"""Pictures for people: boxes on images, and figures of several panels."""

from __future__ import annotations

from .boxes import class_color, draw_boxes, enlarged, ground_truth, name_of
from .panels import new_figure

__all__ = ["class_color", "draw_boxes", "enlarged", "ground_truth", "name_of", "new_figure"]

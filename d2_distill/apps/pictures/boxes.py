"""Labelled boxes drawn onto images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.structures import Instances
from PIL import Image, ImageColor, ImageDraw, ImageFont

READABLE = 288  # pixels to which the longer side of a small image is enlarged
LINE_WIDTH = 2
FONT_SIZE = 14
Color = tuple[int, int, int]


def class_color(index: int) -> Color:
    """A colour (RGB, 0 to 255) for a class; those of neighbouring classes differ clearly."""
    golden = 0.618033988749895  # a turn of the golden angle never comes back to a used hue
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(index * golden % 1, 0.8, 1.0))


def name_of(index: int, class_names: Sequence[str]) -> str:
    """Name of a class, or its number where the names are not known."""
    return class_names[index] if index < len(class_names) else str(index)


def ground_truth(record: dict[str, Any]) -> Instances:
    """``gt_boxes`` and ``gt_classes`` of a record in Detectron2's standard form, crowds left out."""
    annotations = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    return detection_utils.annotations_to_instances(annotations, (record["height"], record["width"]))


def enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image (H, W, 3), enlarged by the returned whole number if it is too small for labels to be read."""
    scale = max(1, READABLE // max(image.shape[:2]))
    return image.repeat(scale, axis=0).repeat(scale, axis=1), scale


def draw_boxes(
    image: np.ndarray, boxes: torch.Tensor, labels: Sequence[str], colors: Sequence[Any]
) -> np.ndarray:
    """A copy of an RGB image with labelled boxes.

    Args:
        image: (H, W, 3) uint8; a small one is :func:`enlarged`.
        boxes: (R, 4) XYXY in pixels of ``image``.
        labels: R texts; "" for none.
        colors: R colours, (r, g, b) or a name that Pillow knows.
    """
    image, scale = enlarged(image)
    picture = Image.fromarray(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for box, label, color in zip((boxes * scale).tolist(), labels, colors):
        color = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
        x0, y0, x1, y1 = box
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=LINE_WIDTH)
        if label:
            _, _, width, height = draw.textbbox((0, 0), label, font=font)
            left = max(0, min(x0, picture.width - width - 4))
            top = y0 - height - 3 if y0 > height + 3 else y0
            draw.rectangle((left, top, left + width + 3, top + height + 3), fill=color)
            dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            draw.text((left + 2, top + 1), label, fill="black" if dark else "white", font=font)
    return np.asarray(picture)

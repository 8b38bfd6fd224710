"""Pictures of what detectors find, beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

from .boxes import FONT_SIZE, class_color, draw_boxes, name_of

TITLE_HEIGHT = FONT_SIZE + 10
GAP = 4  # pixels between pictures


def draw_detections(image: np.ndarray, detections: Instances, class_names: Sequence[str]) -> np.ndarray:
    """A copy of an RGB image with labelled boxes, a colour for each class; see :func:`draw_boxes`.

    Args:
        image: (H, W, 3) uint8.
        detections: ``pred_boxes`` in pixels of ``image``, ``scores`` and ``pred_classes``; the surest lie on top.
        class_names: may be empty.
    """
    detections = detections[detections.scores.argsort()]
    classes = detections.pred_classes.tolist()
    labels = [f"{name_of(k, class_names)} {s:.0%}" for k, s in zip(classes, detections.scores.tolist())]
    return draw_boxes(image, detections.pred_boxes.tensor, labels, [class_color(k) for k in classes])


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """One RGB picture of several of the same size, each below its title; a single picture is returned as it is."""
    if len(pictures) == 1:
        return pictures[0]
    height, width = pictures[0].shape[:2]
    canvas = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + TITLE_HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for column, (picture, title) in enumerate(zip(pictures, titles)):
        left = column * (width + GAP)
        canvas.paste(Image.fromarray(picture), (left, TITLE_HEIGHT))
        draw.text((left + width / 2, TITLE_HEIGHT / 2), title, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)

"""Detections of several models beside the ground truth, and the choice of images to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import numpy as np
import torch
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

from ...data.pictures import read_image
from ...data.subset import evenly_spread
from ...evaluation.matching import match_detections
from ..pictures import draw_boxes, ground_truth, name_of
from .measures import Detector, Record

CANDIDATES = 200  # images that are looked through for those on which the models differ
SIDE = 360  # pixels of the longer side of a picture
GAP, MARGIN, FONT_SIZE = 8, 12, 18
# Of the colours that Okabe and Ito chose for eyes of every kind.
RIGHT, WRONG, MISSED, TRUTH = (86, 180, 233), (230, 159, 0), (240, 90, 200), (240, 228, 66)
LEGEND = (
    ("ground truth", TRUTH), ("on an object of its class", RIGHT), ("wrong", WRONG), ("missed object", MISSED),
)


def most_different(
    records: Sequence[Record],
    detectors: dict[str, Detector],
    threshold: float,
    count: int,
    *,
    progress: Callable[[str], None],
) -> list[Record]:
    """The images, of at most ``CANDIDATES`` evenly spread ones, on which the models' numbers of errors differ most."""
    candidates = evenly_spread(records, CANDIDATES)
    differences = []
    for number, record in enumerate(candidates, start=1):
        progress(f"looking for differences: image {number} of {len(candidates)}")
        truth = ground_truth(record)
        errors = [
            match_detections(detector.detect(record, threshold), truth).errors for detector in detectors.values()
        ]
        differences.append(max(errors) - min(errors))
    order = sorted(range(len(candidates)), key=lambda index: -differences[index])
    return [candidates[index] for index in order[:count]]


def draw_comparison(
    records: Sequence[Record],
    detectors: dict[str, Detector],
    class_names: Sequence[str],
    threshold: float,
    *,
    progress: Callable[[str], None],
) -> Image.Image:
    """A row an image: the ground truth, then each model's detections that score at least ``threshold``."""
    rows = []
    for number, record in enumerate(records, start=1):
        progress(f"detections: image {number} of {len(records)}")
        image, truth = read_image(record["file_name"], "RGB"), ground_truth(record)
        names = [name_of(k, class_names) for k in truth.gt_classes.tolist()]
        row = [_draw(image, truth.gt_boxes.tensor, names, [TRUTH] * len(truth))]
        for detector in detectors.values():
            row.append(_verdict(image, detector.detect(record, threshold), truth, class_names))
        rows.append(row)
    return _grid(rows, ["ground truth", *detectors])


def _verdict(image: np.ndarray, found: Instances, truth: Instances, class_names: Sequence[str]) -> Image.Image:
    order = found.scores.argsort()  # the surest lie on top
    found = found[order]
    match = match_detections(found, truth)
    missed = truth[match.missed]
    boxes = torch.cat([missed.gt_boxes.tensor, found.pred_boxes.tensor])
    names = [name_of(k, class_names) for k in found.pred_classes.tolist()]
    labels = [""] * len(missed) + [f"{name} {score:.0%}" for name, score in zip(names, found.scores.tolist())]
    colors = [MISSED] * len(missed) + [RIGHT if right else WRONG for right in match.right.tolist()]
    return _draw(image, boxes, labels, colors)


def _draw(image: np.ndarray, boxes: torch.Tensor, labels: Sequence[str], colors: Sequence) -> Image.Image:
    """Brought to its size first, so that lines and letters are as large on every image."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
    return Image.fromarray(draw_boxes(resized, boxes * scale, labels, colors))


def _grid(rows: list[list[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Pictures below the titles of their columns and a legend of the colours."""
    font = ImageFont.load_default(FONT_SIZE)
    column = max(picture.width for row in rows for picture in row) + GAP
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    line = FONT_SIZE + GAP
    legend_width = sum(int(font.getlength(text)) + 2 * line for text, _ in LEGEND)
    width = max(column * len(titles) - GAP, legend_width) + 2 * MARGIN
    canvas = Image.new("RGB", (width, sum(heights) - GAP + 2 * MARGIN + 2 * line), "white")
    draw = ImageDraw.Draw(canvas)
    left = MARGIN
    for text, color in LEGEND:
        draw.rectangle((left, MARGIN, left + FONT_SIZE, MARGIN + FONT_SIZE), fill=color, outline="gray")
        draw.text((left + line, MARGIN), text, fill="black", font=font)
        left += int(font.getlength(text)) + 2 * line
    top = MARGIN + line
    for index, title in enumerate(titles):
        draw.text((MARGIN + index * column, top), _fitting(title, font, column - GAP), fill="black", font=font)
    top += line
    for row, height in zip(rows, heights):
        for index, picture in enumerate(row):
            canvas.paste(picture, (MARGIN + index * column, top))
        top += height
    return canvas


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, without its end if it is too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."

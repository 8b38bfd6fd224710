"""What can be wrong with a data set's records in Detectron2's standard form."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from detectron2.structures import BoxMode

from . import problems
from .problems import Found, Kind, Problem

_FIELDS = ("file_name", "height", "width", "annotations")
# Pixels that a box may stick out of its image: annotation tools differ in whether they count from 0 or from 1.
TOLERANCE = 1.0


def check_records(records: Sequence[dict], class_names: Sequence[str], found: Found) -> list[dict]:
    """Tell what is wrong with records; no image file is opened.

    Args:
        found: takes each problem.

    Returns:
        The records with those of their annotations that can be used, crowds among them. Those without their file are
        kept.
    """
    complete = []
    for index, record in enumerate(records):
        missing = [field for field in _FIELDS if field not in record]
        if missing:
            fault = f"record {index} ({record.get('file_name')}) lacks {missing[0]!r}"
            found(Problem(problems.MALFORMED_RECORD, fault))
        else:
            complete.append(record)
    check_image_files(complete, found)
    return _with_usable_annotations(complete, class_names, found)


def check_image_files(records: Sequence[dict], found: Found) -> None:
    """Tell which image files are missing; none is opened.

    Args:
        found: takes each problem.
    """
    lost = [record["file_name"] for record in records if not os.path.isfile(record["file_name"])]
    for path in lost:
        count = f"{len(lost)} of {len(records)} are missing"
        found(Problem(problems.MISSING_IMAGE, f"the image file {path} is missing ({count}){_other_suffix(path)}"))


def usable_boxes(records: Sequence[dict]) -> int:
    """Number of boxes to learn from, in what :func:`check_records` returned."""
    return sum(not is_crowd(annotation) for record in records for annotation in record["annotations"])


def is_crowd(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd", 0))


def is_image_size(value: float) -> bool:
    """Return whether a number is a width or height in pixels."""
    return 0 < value < math.inf and value == int(value)


def place_of(record: dict, number: int) -> str:
    """How a sentence names an annotation: by its id where it is known, else by its number within its image."""
    return f"image {record['file_name']}, annotation {record['annotations'][number].get('id', number)}"


def boxes_xyxy(annotations: Sequence[dict]) -> np.ndarray:
    """(R, 4) XYXY in pixels."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    modes = np.array([annotation["bbox_mode"] for annotation in annotations])
    for mode in set(modes.tolist()):
        boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes


def _other_suffix(path: str) -> str:
    """Pascal VOC folders hold .jpg files, and exports often name others than they hold."""
    stem, suffix = os.path.splitext(path)
    for other in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"):
        for candidate in (stem + other, stem + other.upper()):
            if other != suffix and os.path.isfile(candidate):
                return f", but there is {candidate}"
    return ""


def _with_usable_annotations(records: list[dict], class_names: Sequence[str], found: Found) -> list[dict]:
    pairs = []
    for record in records:
        for number, annotation in enumerate(record["annotations"]):
            fault = _malformed(annotation, class_names)
            if fault:
                found(Problem(problems.MALFORMED_RECORD, f"{place_of(record, number)}: {fault}"))
            else:
                pairs.append((record, number))
    annotations = [record["annotations"][number] for record, number in pairs]
    boxes = boxes_xyxy(annotations)
    size = np.array([(record["width"], record["height"]) for record, _ in pairs], dtype=np.float64).reshape(-1, 2)
    crowd = np.array([is_crowd(annotation) for annotation in annotations], dtype=bool)

    def tell(kind: Kind, bad: np.ndarray, fault: str) -> None:
        for index in np.flatnonzero(bad):
            sentence = f"the box {annotations[index]['bbox']} {fault.format(*size[index])}"
            found(Problem(kind, f"{place_of(*pairs[index])}: {sentence}"))

    finite = np.isfinite(boxes).all(axis=1)
    tell(problems.NOT_FINITE, ~finite, "is not finite")
    boxes = np.where(finite[:, None], boxes, 0)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    tell(problems.NO_AREA, finite & ~crowd & ~has_area, "has no area")
    inside = (np.minimum(boxes[:, 2:], size) > np.maximum(boxes[:, :2], 0)).all(axis=1)
    tell(problems.OUTSIDE, finite & ~crowd & has_area & ~inside, "lies outside the image of {:.0f} x {:.0f}")
    out = ((boxes[:, :2] < -TOLERANCE) | (boxes[:, 2:] > size + TOLERANCE)).any(axis=1)
    tell(problems.STICKS_OUT, out & inside & ~crowd, "sticks out of the image of {:.0f} x {:.0f}")
    good = finite & (crowd | has_area & inside)

    kept: dict[int, list[dict]] = {}
    for index in np.flatnonzero(good):
        kept.setdefault(id(pairs[index][0]), []).append(annotations[index])
    return [{**record, "annotations": kept.get(id(record), [])} for record in records]


def _malformed(annotation: dict, class_names: Sequence[str]) -> str:
    if len(annotation.get("bbox", ())) != 4:
        return f"the box is {annotation.get('bbox')}, not four numbers"
    category = annotation["category_id"]
    if not 0 <= category < len(class_names):
        return f"category {category} is outside the class list of {len(class_names)} classes"
    return ""

"""What can be wrong with a data set's records in Detectron2's standard form."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from itertools import chain

import numpy as np
from detectron2.structures import BoxMode

from . import problems
from .problems import Found, Kind, Problem

_FIELDS = ("file_name", "height", "width", "annotations")
# Pixels that a box may stick out of its image: annotation tools differ in whether they count from 0 or from 1.
TOLERANCE = 1.0
# Boxes of a set are corners where nearly all can be, and so many of them leave their image by so much of its side if not.
_CORNERS_READ, _CORNERS_FAR, _FAR_OUT = 0.98, 0.2, 0.1
_LARGEST_SIDE = 2**31
_PIXEL_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


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
        fault = _malformed_record(record)
        if fault:
            name = record.get("file_name") if isinstance(record, dict) else record
            found(Problem(problems.MALFORMED_RECORD, f"record {index} ({name}) {fault}"))
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
        state = "is a folder" if os.path.isdir(path) else "is missing"
        found(Problem(problems.MISSING_IMAGE, f"the image file {path} {state} ({count}){_hint(path)}"))


def usable_boxes(records: Sequence[dict]) -> int:
    """Number of boxes to learn from, in what :func:`check_records` returned."""
    return sum(not is_crowd(annotation) for record in records for annotation in record["annotations"])


def is_crowd(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd", 0))


def is_image_size(value: float) -> bool:
    """Return whether a number is a width or height in pixels."""
    return 0 < value < _LARGEST_SIDE and value == int(value)


def place_of(record: dict, number: int) -> str:
    """How a sentence names an annotation: by its id where it is known, else by its number within its image."""
    annotation = record["annotations"][number]
    return f"image {record['file_name']}, annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"


def boxes_xyxy(annotations: Sequence[dict]) -> np.ndarray:
    """(R, 4) XYXY in pixels."""
    return _as_corners(*_as_written(annotations))


def _as_written(annotations: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(R, 4) boxes as they are, and (R,) their modes."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    modes = np.fromiter((annotation["bbox_mode"] for annotation in annotations), dtype=np.int64, count=len(annotations))
    return boxes, modes


def _as_corners(boxes: np.ndarray, modes: np.ndarray) -> np.ndarray:
    boxes = boxes.copy()
    for mode in np.unique(modes).tolist():
        boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes


def _hint(path: str) -> str:
    """What the file may be called instead.

    Pascal VOC folders hold .jpg files, and exports often name others than they hold, or write paths as Windows does.
    """
    if "\\" in path:
        slashed = path.replace("\\", "/")
        found = f", but there is {slashed}" if os.path.isfile(slashed) else ""
        return f"; its name has backslashes, which part folders on Windows only: write / instead{found}"
    stem, suffix = os.path.splitext(path)
    for other in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"):
        for candidate in (stem + other, stem + other.upper()):
            if other != suffix and os.path.isfile(candidate):
                return f", but there is {candidate}"
    return ""


def _with_usable_annotations(records: list[dict], class_names: Sequence[str], found: Found) -> list[dict]:
    pairs = [(record, number) for record in records for number in range(len(record["annotations"]))]
    if not _are_good([record["annotations"][number] for record, number in pairs], len(class_names)):
        good_pairs = []
        for record, number in pairs:
            fault = _malformed(record["annotations"][number], class_names)
            if fault:
                found(Problem(problems.MALFORMED_RECORD, f"{place_of(record, number)}: {fault}"))
            else:
                good_pairs.append((record, number))
        pairs = good_pairs
    annotations = [record["annotations"][number] for record, number in pairs]
    written, modes = _as_written(annotations)
    boxes = _as_corners(written, modes)
    size = np.array([(record["width"], record["height"]) for record, _ in pairs], dtype=np.float64).reshape(-1, 2)
    crowd = np.array([is_crowd(annotation) for annotation in annotations], dtype=bool)

    def tell(kind: Kind, bad: np.ndarray, fault: str) -> None:
        for index in np.flatnonzero(bad):
            sentence = f"the box {annotations[index]['bbox']} {fault.format(*size[index])}"
            found(Problem(kind, f"{place_of(*pairs[index])}: {sentence}"))

    finite = np.isfinite(boxes).all(axis=1)
    tell(problems.NOT_FINITE, ~finite, "is not finite")
    boxes = np.where(finite[:, None], boxes, 0)
    form = _wrong_form(written, modes, size, considered=finite & ~crowd & (size > 2).all(axis=1))
    if form is not None:
        kind, fault, index = form
        sentence = f"the box {annotations[index]['bbox']} {fault}"
        found(Problem(kind, f"{place_of(*pairs[index])}: {sentence}"))
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


def _wrong_form(
    boxes: np.ndarray, modes: np.ndarray, size: np.ndarray, *, considered: np.ndarray
) -> tuple[Kind, str, int] | None:
    """Whether a whole set's boxes are written in another form than they are read in.

    Args:
        boxes: (R, 4) as they are written.
        modes: (R,) theirs.
        size: (R, 2) widths and heights of their images.
        considered: (R,) whether a box counts.

    Returns:
        The kind of problem, what is wrong, and the number of a box that shows it.
    """
    places = np.flatnonzero(considered)
    boxes, modes, size = boxes[places], modes[places], size[places]
    if not len(boxes):
        return None
    # Pascal VOC's corners, which count from 1, have become smaller by that.
    within = (np.abs(boxes) <= 1).all(axis=1)
    broken = within & (boxes != np.round(boxes)).any(axis=1)
    if within.all() or 2 * broken.sum() >= len(boxes):
        share = f"as {within.sum()} of the {len(boxes)} boxes do"
        return problems.RELATIVE, f"lies within the image's first pixel, {share}", int(places[np.argmax(within)])
    far = (boxes[:, :2] + boxes[:, 2:] > (1 + _FAR_OUT) * size).any(axis=1) & (modes == BoxMode.XYWH_ABS)
    corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, :2] >= -TOLERANCE).all(axis=1)
    corners &= (boxes[:, 2:] <= size + TOLERANCE).all(axis=1)
    if far.sum() >= max(min(2, len(boxes)), _CORNERS_FAR * len(boxes)) and corners.mean() >= _CORNERS_READ:
        fault = f"leaves its image far, as {far.sum()} of the {len(boxes)} boxes do, but fits as two corners, as do the others"
        return problems.CORNERS, fault, int(places[np.argmax(far)])
    return None


def _malformed_record(record: dict) -> str:
    """What is wrong with a record, apart from its annotations."""
    if not isinstance(record, dict):
        return "is no dict"
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        return f"lacks {missing[0]!r}"
    if not isinstance(record["file_name"], (str, os.PathLike)) or not str(record["file_name"]):
        return f"has the file_name {record['file_name']!r}, which is no path"
    for field in ("width", "height"):
        value = record[field]
        if not _is_number(value) or not is_image_size(value):
            return f"has the {field} {value!r}, which is no number of pixels"
    if not isinstance(record["annotations"], (list, tuple)):
        return f"has {record['annotations']!r} as annotations, which is no list"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _are_good(annotations: Sequence[dict], num_classes: int) -> bool:
    """Whether :func:`_malformed` would find nothing in many annotations, of the types that files give."""
    try:
        columns = [[row[name] for row in annotations] for name in ("bbox", "category_id", "bbox_mode")]
        crowds = [row.get("iscrowd", 0) for row in annotations]
    except (KeyError, TypeError, AttributeError):
        return False
    boxes, categories, modes = columns
    return (
        set(map(type, boxes)) <= {list, tuple}
        and set(map(len, boxes)) <= {4}
        and set(map(type, chain.from_iterable(boxes))) <= {int, float}
        and set(map(type, categories)) <= {int}
        and 0 <= min(categories, default=0) <= max(categories, default=0) < max(num_classes, 1)
        and set(map(type, crowds)) <= {int}
        and set(crowds) <= {0, 1}
        and set(modes) <= set(_PIXEL_MODES)
    )


def _malformed(annotation: dict, class_names: Sequence[str]) -> str:
    if not isinstance(annotation, dict):
        return f"it is {annotation!r}, no dict"
    box = annotation.get("bbox", ())
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(map(_is_number, box)):
        return f"the box is {annotation.get('bbox')}, not four numbers"
    for field in ("category_id", "bbox_mode"):
        if field not in annotation:
            return f"it lacks {field!r}"
    if annotation["bbox_mode"] not in _PIXEL_MODES:
        return f"the bbox_mode is {annotation['bbox_mode']!r}; use BoxMode.XYXY_ABS or BoxMode.XYWH_ABS, in pixels"
    crowd = annotation.get("iscrowd", 0)
    if not isinstance(crowd, (bool, np.bool_, numbers.Real)) or crowd not in (0, 1):
        return f"the iscrowd is {crowd!r}, not 0 or 1"
    category = annotation["category_id"]
    if not isinstance(category, numbers.Integral) or isinstance(category, bool):
        return f"the category_id is {category!r}, not a whole number"
    if not 0 <= category < len(class_names):
        return f"category {category} is outside the class list of {len(class_names)} classes"
    return ""

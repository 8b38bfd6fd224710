"""What the fields of a COCO annotation file have to be; whole columns are checked at once, as files are large."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from . import problems
from .problems import Kind
from .records import is_image_size

Tell = Callable[[Kind, str], None]

_LARGEST = 2**63  # numpy, which COCO's evaluation computes with, has no larger integers


@dataclass(frozen=True)
class Field:
    """What a field of an entry has to be.

    Attributes:
        wanted: what is right, in words.
        types: exact types of the value; ``bool`` is no ``int`` here.
        all_good: whether all of some values of these types are right.
        needed: whether an entry needs the field.
    """

    wanted: str
    types: tuple[type, ...]
    all_good: Callable[[Sequence[Any]], bool]
    needed: bool = True

    def accepts(self, values: Sequence[Any]) -> bool:
        return set(map(type, values)) <= set(self.types) and self.all_good(values)


def _are_ids(values: Sequence[Any]) -> bool:
    return all(value != "" if isinstance(value, str) else -_LARGEST <= value < _LARGEST for value in values)


def _are_texts(values: Sequence[str]) -> bool:
    return all(value.strip() and "\0" not in value for value in values)


def _are_boxes(values: Sequence[list]) -> bool:
    numbers = list(chain.from_iterable(values))
    if set(map(len, values)) - {4} or not set(map(type, numbers)) <= {int, float}:
        return False
    try:
        np.array(numbers, dtype=np.float64)
    except OverflowError:  # an integer of hundreds of digits
        return False
    return True


def _are_flags(values: Sequence[float]) -> bool:
    return set(values) <= {0, 1}


def _are_areas(values: Sequence[float]) -> bool:
    return all(0 <= value < float("inf") for value in values)


def _are_segmentations(values: Sequence[Any]) -> bool:
    parts = [value for value in values if isinstance(value, list)]
    return set(map(type, chain.from_iterable(parts))) <= {list}


_ID = Field("a number or a text", (int, str), _are_ids)
_NUMBER = Field("a number", (int,), _are_ids)
_TEXT = Field("a text", (str,), _are_texts)
_SIDE = Field("a number of pixels", (int, float), lambda values: all(map(is_image_size, values)))
_BOX = Field("[x, y, width, height], four numbers", (list,), _are_boxes)
_FLAG = Field("0 or 1", (int, float), _are_flags, needed=False)
_IGNORE = Field("0 or 1", (int, float, bool), lambda values: True, needed=False)
_AREA = Field("a number of square pixels", (int, float), _are_areas, needed=False)
_SEGMENTATION = Field(
    "a list of polygons or an object with run lengths", (list, dict, type(None)), _are_segmentations, needed=False
)
# Texts serve as ids, but not of categories, which are sorted.
_FIELDS = {
    "images": {"id": _ID, "file_name": _TEXT, "height": _SIDE, "width": _SIDE},
    "annotations": {
        "id": _ID, "image_id": _ID, "category_id": _NUMBER, "bbox": _BOX, "iscrowd": _FLAG, "ignore": _IGNORE,
        "segmentation": _SEGMENTATION,
    },
    "categories": {"id": _NUMBER, "name": _TEXT},
}  # fmt: skip
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def fields_of(section: str, *, evaluated: bool) -> dict[str, Field]:
    """Return the fields that are read of the entries of ``"images"``, ``"annotations"`` or ``"categories"``.

    Args:
        evaluated: whether COCO's evaluation reads them, too.
    """
    return {**_FIELDS[section], **({"area": _AREA} if evaluated and section == "annotations" else {})}


def usable_rows(rows: list, section: str, fields: dict[str, Field], tell: Tell) -> list[dict]:
    """Entries of a section whose fields are all right and that have an id of their own.

    Args:
        fields: see :func:`fields_of`.
        tell: takes what is wrong with the others.
    """
    if _are_good(rows, fields):
        return list(rows)
    usable, seen = [], set()
    for index, row in enumerate(rows):
        fault = _fault(row, index, section, fields)
        if fault is not None:
            tell(problems.MALFORMED_ENTRY, fault)
        elif row["id"] in seen:
            tell(problems.REPEATED_ID, f"two entries of {section!r} have the id {row['id']}")
        else:
            seen.add(row["id"])
            usable.append(row)
    return usable


def _are_good(rows: list, fields: dict[str, Field]) -> bool:
    if not set(map(type, rows)) <= {dict}:
        return False
    for name, field in fields.items():
        values = [row[name] for row in rows if name in row]
        if not field.accepts(values) or (field.needed and len(values) < len(rows)):
            return False
    return len({row["id"] for row in rows}) == len(rows)


def _fault(row: Any, index: int, section: str, fields: dict[str, Field]) -> str | None:
    """What is wrong with an entry, if anything."""
    entry = f"entry {index} of {section!r}"
    if not isinstance(row, dict):
        return f"{entry} lacks {next(iter(fields))!r}: it is {reprlib.repr(row)} and no object"
    missing = [name for name, field in fields.items() if field.needed and name not in row]
    if missing:
        return f"{entry} lacks {missing[0]!r}"
    wrong = [name for name, field in fields.items() if name in row and not field.accepts([row[name]])]
    if not wrong:
        return None
    name, value = wrong[0], row[wrong[0]]
    which = entry if "id" in wrong else f"{_SINGULAR[section]} {row['id']}"
    if isinstance(value, float) and fields[name] in (_ID, _NUMBER):
        return f"{which} has the {name} {value!r}, which is a float and not a whole number"
    return f"{which} has the {name} {reprlib.repr(value)}, which is not {fields[name].wanted}"


def is_mask(segmentation: list | dict, height: int, width: int) -> bool:
    """Return whether polygons, or the run lengths of a mask, can be those of an object in an image.

    Args:
        segmentation: polygons of three points or more, or an object.
        height, width: of the image.
    """
    if isinstance(segmentation, list):
        numbers = list(chain.from_iterable(segmentation))
        return set(map(type, numbers)) <= {int, float} and bool(np.isfinite(np.array(numbers, dtype=np.float64)).all())
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        return set(map(type, counts)) <= {int} and min(counts, default=0) >= 0 and sum(counts) == height * width
    return isinstance(counts, str) and counts != ""

"""Reads COCO annotation files leniently, and tells everything that is wrong with them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.structures import BoxMode
from pycocotools import mask as masks_of_coco

from . import problems
from .problems import Found, Kind, Problem, refusing
from .records import is_image_size


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_side(value: Any) -> bool:
    return isinstance(value, (int, float)) and is_image_size(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and _NUMBERS.issuperset(map(type, value))


_NUMBERS = frozenset((int, float))
# What the fields of each section's entries are. Texts serve as ids, but not of categories, which are sorted.
_SECTIONS = {
    "images": {"id": _is_id, "file_name": _is_text, "height": _is_side, "width": _is_side},
    "annotations": {"id": _is_id, "image_id": _is_id, "category_id": _is_number, "bbox": _is_box},
    "categories": {"id": _is_number, "name": _is_text},
}
_WANTED = {
    "id": "a number", "image_id": "a number", "category_id": "a number", "file_name": "a text", "name": "a text",
    "height": "a number of pixels", "width": "a number of pixels", "bbox": "[x, y, width, height]",
}  # fmt: skip
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def coco_class_names(json_file: str, *, source: str, evaluated: bool = False) -> list[str]:
    """Class names of a COCO instance annotation file, in the order of their category ids.

    Args:
        json_file: path of the file.
        evaluated: whether annotations need what COCO's evaluation reads besides, ``area`` and ``iscrowd``.
        source: who names the file, e.g. ``"DATASETS.COCO (data set 'mine')"``; the errors begin with it.

    Raises:
        UserError: the file is missing, is not JSON, or is not a consistent COCO instance annotation file.
    """
    sections = _coco_sections(json_file, refusing(source), evaluated)
    return [category["name"] for category in sections["categories"]]


class CocoSet(NamedTuple):
    """What a COCO instance annotation file says.

    Attributes:
        records: in Detectron2's standard form, in the order of their image ids.
        sections: the usable entries of the file's lists; categories in the order of their ids.
    """

    records: list[dict[str, Any]]
    sections: dict[str, list[dict[str, Any]]]

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.sections["categories"]]


def read_coco(json_file: str, image_root: str, found: Found, *, evaluated: bool, with_masks: bool = False) -> CocoSet:
    """Read a COCO instance annotation file.

    What is malformed is told and left out. So are annotations with polygons of which none has three points: Detectron2
    leaves them out, too. Annotations keep their ``id``.

    Args:
        found: takes each problem.
        evaluated: see :func:`coco_class_names`.
        with_masks: annotations also get ``segmentation``, for detectors that predict masks.
    """
    sections = _coco_sections(json_file, found, evaluated)
    class_of = category_numbers(sections["categories"])
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(sections["images"], key=lambda image: (isinstance(image["id"], str), image["id"]))
    }
    for row in sections["annotations"]:
        polygons = row.get("segmentation")
        if polygons and isinstance(polygons, list):
            polygons = [part for part in polygons if isinstance(part, list) and len(part) % 2 == 0 and len(part) >= 6]
            if not polygons:
                fault = f"{json_file}: annotation {row['id']} has no polygon of three points or more"
                found(Problem(problems.NO_POLYGON, fault))
                continue
        annotation = {
            "id": row["id"],
            "bbox": row["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": class_of[row["category_id"]],
            "iscrowd": row.get("iscrowd", 0),
        }
        if with_masks and polygons:
            annotation["segmentation"] = polygons if isinstance(polygons, list) else _compressed(polygons)
        records[row["image_id"]]["annotations"].append(annotation)
    return CocoSet(list(records.values()), sections)


def category_numbers(categories: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Return the class number of each category id."""
    return {category["id"]: index for index, category in enumerate(categories)}


def _compressed(run_lengths: dict[str, Any]) -> dict[str, Any]:
    """The run lengths of a mask as pycocotools packs them."""
    if isinstance(run_lengths["counts"], list):
        return masks_of_coco.frPyObjects(run_lengths, *run_lengths["size"])
    return run_lengths


_TRUTH = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}


def coco_truth(sections: dict[str, list[dict[str, Any]]], *, with_masks: bool) -> bytes:
    """Return a pickled COCO dataset with all that an evaluation reads of the file's lists.

    Args:
        sections: see :class:`CocoSet`.
        with_masks: keep ``segmentation``.
    """
    fields = {**_TRUTH, "annotations": (*_TRUTH["annotations"], *["segmentation"] * with_masks)}
    dataset = {
        name: [{field: row[field] for field in fields[name] if field in row} for row in rows]
        for name, rows in sections.items()
    }
    return pickle.dumps(dataset, protocol=pickle.HIGHEST_PROTOCOL)


def _coco_sections(json_file: str, found: Found, evaluated: bool) -> dict[str, list[dict]]:
    """The usable entries of each section; categories in the order of their ids."""
    sections = {name: [] for name in _SECTIONS}
    content = _read_json(json_file, found)
    if content is None:
        return sections

    def tell(kind: Kind, fault: str) -> None:
        found(Problem(kind, f"{json_file}: {fault}"))

    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _SECTIONS):
        found(Problem(
            problems.NOT_COCO,
            f"{json_file} is not a COCO annotation file, which is an object with the lists 'images', 'annotations' and "
            "'categories'",
        ))
        return sections
    for name in _SECTIONS:
        sections[name] = _usable_rows(content[name], name, tell)
    sections["categories"].sort(key=lambda row: row["id"])
    names = [row["name"] for row in sections["categories"]]
    for name in sorted({name for name in names if names.count(name) > 1}):
        tell(problems.REPEATED_CLASS, f"'categories' has the name {name!r} twice")
    sections["annotations"] = _linked_annotations(sections, content, tell)
    for row in sections["annotations"] if evaluated else ():
        missing = [field for field in ("area", "iscrowd") if not isinstance(row.get(field), (int, float))]
        if missing:
            fault = f"annotation {row['id']} has no number as {missing[0]!r}, which COCO's evaluation needs"
            tell(problems.NOT_EVALUABLE, fault)
    return sections


def _linked_annotations(sections: dict[str, list[dict]], content: dict, tell) -> list[dict]:
    """Annotations whose image and category are usable."""
    usable = sections["annotations"]
    for section, field, kind in (
        ("categories", "category_id", problems.UNKNOWN_CATEGORY), ("images", "image_id", problems.UNKNOWN_IMAGE)
    ):
        known = {row["id"] for row in sections[section]}
        # Those of entries that are told to be malformed are not told once more.
        ids = (row.get("id") for row in content[section] if isinstance(row, dict))
        told = {id_ for id_ in ids if isinstance(id_, (int, str))}
        linked = []
        for row in usable:
            if row[field] in known:
                linked.append(row)
            elif row[field] not in told:
                fault = f"has {field} {row[field]}, which is not among the {section!r}"
                tell(kind, f"annotation {row['id']} {fault}")
        usable = linked
    for row in usable:
        if row.get("ignore", 0) != 0:
            tell(problems.IGNORED, f"annotation {row['id']} has 'ignore' set, which Detectron2 does not support")
    return [row for row in usable if row.get("ignore", 0) == 0]


def _read_json(json_file: str, found: Found):
    """The content, or None."""
    try:
        with open(json_file, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        found(Problem(
            problems.MISSING_FILE, f"the annotation file {json_file} cannot be read ({error.strerror})"
        ))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        found(Problem(problems.NOT_JSON, f"the annotation file {json_file} is not valid JSON ({error})"))
    return None


def _usable_rows(rows: list, section: str, tell) -> list[dict]:
    """Entries of a section that have all fields, of the right types, and an id of their own."""
    usable, seen, fields = [], set(), _SECTIONS[section]
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not fields.keys() <= row.keys():
            missing = next(field for field in fields if not isinstance(row, dict) or field not in row)
            tell(problems.MALFORMED_ENTRY, f"entry {index} of {section!r} lacks {missing!r}")
            continue
        wrong = [field for field, is_good in fields.items() if not is_good(row[field])]
        if wrong:
            which = f"entry {index} of {section!r}" if "id" in wrong else f"{_SINGULAR[section]} {row['id']}"
            fault = f"has the {wrong[0]} {row[wrong[0]]!r}, which is not {_WANTED[wrong[0]]}"
            tell(problems.MALFORMED_ENTRY, f"{which} {fault}")
        elif row["id"] in seen:
            tell(problems.REPEATED_ID, f"two entries of {section!r} have the id {row['id']}")
        else:
            seen.add(row["id"])
            usable.append(row)
    return usable

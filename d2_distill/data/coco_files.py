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
from .coco_fields import fields_of, is_mask, usable_rows
from .problems import Found, Kind, Problem, refusing

_SECTIONS = ("images", "annotations", "categories")


def coco_class_names(json_file: str, *, source: str, evaluated: bool = False) -> list[str]:
    """Class names of a COCO instance annotation file, in the order of their category ids.

    Args:
        json_file: path of the file.
        evaluated: whether annotations need what COCO's evaluation reads besides, ``area`` and ``iscrowd``.
        source: who names the file, e.g. ``"DATASETS.COCO (data set 'mine')"``; the errors begin with it.

    Raises:
        UserError: the file is missing, is not JSON, or is not a consistent COCO instance annotation file.
    """
    sections = _coco_sections(json_file, refusing(source), evaluated=evaluated, with_masks=False)
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
    sections = _coco_sections(json_file, found, evaluated=evaluated, with_masks=with_masks)
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
        record = records[row["image_id"]]
        if with_masks and polygons and not is_mask(polygons, record["height"], record["width"]):
            size = f"{record['width']} x {record['height']}"
            fault = f"annotation {row['id']} has a segmentation that is no polygons or run lengths for an image of {size}"
            found(Problem(problems.MALFORMED_ENTRY, f"{json_file}: {fault}"))
            continue
        annotation = {
            "id": row["id"],
            "bbox": row["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": class_of[row["category_id"]],
            "iscrowd": int(row.get("iscrowd", 0)),
        }
        if with_masks and polygons:
            annotation["segmentation"] = polygons if isinstance(polygons, list) else _compressed(polygons)
        record["annotations"].append(annotation)
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

    Annotations are numbered from 1: COCO's evaluation takes a match with the id 0 for none, and fails at texts.

    Args:
        sections: see :class:`CocoSet`.
        with_masks: keep ``segmentation``.
    """
    fields = {**_TRUTH, "annotations": (*_TRUTH["annotations"], *["segmentation"] * with_masks)}
    dataset = {
        name: [{field: row[field] for field in fields[name] if field in row} for row in rows]
        for name, rows in sections.items()
    }
    for number, row in enumerate(dataset["annotations"], start=1):
        row["id"] = number
    return pickle.dumps(dataset, protocol=pickle.HIGHEST_PROTOCOL)


def _coco_sections(json_file: str, found: Found, *, evaluated: bool, with_masks: bool) -> dict[str, list[dict]]:
    """The usable entries of each section; categories in the order of their ids."""
    sections = {name: [] for name in _SECTIONS}
    content = _read_json(json_file, found)
    if content is None:
        return sections

    def tell(kind: Kind, fault: str) -> None:
        found(Problem(kind, f"{json_file}: {fault}"))

    lists = "an object with the lists 'images', 'annotations' and 'categories'"
    if not isinstance(content, dict):
        found(Problem(problems.NOT_COCO, f"{json_file} is not a COCO annotation file, which is {lists}"))
        return sections
    wrong = [name for name in _SECTIONS if not isinstance(content.get(name), list)]
    if wrong:
        fault = f"'{wrong[0]}' is {'missing' if wrong[0] not in content else 'no list'}"
        found(Problem(problems.NOT_COCO, f"{json_file} is not a COCO annotation file, which is {lists}: {fault}"))
        return sections
    for name in _SECTIONS:
        sections[name] = usable_rows(content[name], name, fields_of(name, evaluated=evaluated), tell)
    sections["categories"].sort(key=lambda row: row["id"])
    names = [row["name"] for row in sections["categories"]]
    for name in sorted({name for name in names if names.count(name) > 1}):
        tell(problems.REPEATED_CLASS, f"'categories' has the name {name!r} twice")
    if len({type(row["id"]) for row in sections["images"]}) > 1:
        tell(problems.MALFORMED_ENTRY, "some entries of 'images' have numbers as ids and others have texts")
    sections["annotations"] = _linked_annotations(sections, content, tell)
    for row in sections["annotations"] if evaluated else ():
        if "area" not in row or "iscrowd" not in row:
            field = "area" if "area" not in row else "iscrowd"
            fault = f"annotation {row['id']} has no number as {field!r}, which COCO's evaluation needs"
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
            text = file.read()
        content = json.loads(text)
    except OSError as error:
        found(Problem(
            problems.MISSING_FILE, f"the annotation file {json_file} cannot be read ({error.strerror})"
        ))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        found(Problem(problems.NOT_JSON, f"the annotation file {json_file} is not valid JSON ({error})"))
    else:
        twice = _repeated_section(text)
        if twice:
            found(Problem(problems.MALFORMED_ENTRY, f"{json_file} has the list {twice!r} twice, of which one would be lost"))
        return content
    return None


def _repeated_section(text: str) -> str | None:
    """The list that a JSON file has twice; the parser keeps the last one."""
    if all(text.count(f'"{name}"') <= 1 for name in _SECTIONS):
        return None
    keys: list[str] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the outermost object comes last

    json.loads(text, object_pairs_hook=remember)
    return next((name for name in _SECTIONS if keys.count(name) > 1), None)

"""Reads annotation files leniently, and tells everything that is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.structures import BoxMode
from pycocotools import mask as masks_of_coco

from ..errors import UserError
from . import problems
from .problems import Found, Kind, Problem, refusing

_COCO_SECTIONS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_SIZE = ("size/width", "size/height")
_CORNERS = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")


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
    sections = {name: [] for name in _COCO_SECTIONS}
    content = _read_json(json_file, found)
    if content is None:
        return sections

    def tell(kind: Kind, fault: str) -> None:
        found(Problem(kind, f"{json_file}: {fault}"))

    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _COCO_SECTIONS):
        found(Problem(
            problems.NOT_COCO,
            f"{json_file} is not a COCO annotation file, which is an object with the lists 'images', 'annotations' and "
            "'categories'",
        ))
        return sections
    for name, fields in _COCO_SECTIONS.items():
        sections[name] = _usable_rows(content[name], name, fields, tell)
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


def _usable_rows(rows: list, section: str, fields: Sequence[str], tell) -> list[dict]:
    """Entries of a section that have all fields, of the right types, and an id of their own."""
    usable, seen = [], set()
    for index, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            tell(problems.MALFORMED_ENTRY, f"entry {index} of {section!r} lacks {missing[0]!r}")
            continue
        wrong = [field for field in fields if not _is_good(section, field, row[field])]
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


_WANTED = {
    "id": "a number", "image_id": "a number", "category_id": "a number", "file_name": "a text", "name": "a text",
    "height": "a number of pixels", "width": "a number of pixels", "bbox": "[x, y, width, height]",
}  # fmt: skip


def _is_good(section: str, field: str, value) -> bool:
    """Whether a value is what ``_WANTED`` says; texts serve as ids too, but of categories, which are sorted."""
    if field in ("id", "image_id"):
        return isinstance(value, int if section == "categories" else (int, str))
    if field == "category_id":
        return isinstance(value, int)
    if field in ("height", "width"):
        return isinstance(value, (int, float)) and _is_size(value)
    if field == "bbox":
        return isinstance(value, list) and len(value) == 4 and all(isinstance(x, (int, float)) for x in value)
    return isinstance(value, str) and value != ""


def _is_size(value: float) -> bool:
    return 0 < value < math.inf and value == int(value)


def check_voc_folder(dirname: str, split: str, *, source: str) -> list[str]:
    """Image ids that a split of a Pascal VOC folder lists.

    Args:
        dirname: folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: name of a file ``ImageSets/Main/<split>.txt``.
        source: see :func:`coco_class_names`.

    Raises:
        UserError: a folder or the split file is missing, or the latter is malformed.
    """
    return _voc_image_ids(dirname, split, refusing(source))


def check_voc_annotations(dirname: str, split: str, class_names: Sequence[str], *, source: str) -> None:
    """Parse every XML file of a split.

    Raises:
        UserError: names the file that is missing, not XML, lacks a field or has another class.
    """
    read_voc(dirname, split, class_names, refusing(source))


def voc_class_names(dirname: str, *, source: str) -> list[str]:
    """Sorted names of all objects in the ``Annotations`` of a Pascal VOC folder, whatever split they are in.

    So all splits of a folder agree. Files that are not XML are left to :func:`read_voc`.

    Raises:
        UserError: the folder is missing, or there is no object.
    """
    folder = _voc_folder(dirname, "Annotations", refusing(source))
    names = _object_names(folder)
    if not names:
        raise UserError(
            f"{source}: no file of {folder} has an object, from which the classes could be taken; name them in the "
            "row, or annotate some."
        )
    return list(names)


def _object_names(folder: str) -> tuple[str, ...]:
    names = set()
    for file_name in os.listdir(folder):
        if file_name.endswith(".xml"):
            with contextlib.suppress(OSError, ElementTree.ParseError):
                names.update(item.name for item in _parsed(os.path.join(folder, file_name)).objects)
    return tuple(sorted(names - {None, ""}))


def read_voc(dirname: str, split: str, class_names: Sequence[str], found: Found) -> list[dict]:
    """Records in Detectron2's standard form of a split of a Pascal VOC folder.

    What is malformed is told and left out. Annotations tell whether they are ``difficult``.

    Args:
        found: takes each problem.
    """
    records = []
    for image_id in _voc_image_ids(dirname, split, found):
        path = os.path.join(dirname, "Annotations", f"{image_id}.xml")
        content = _read_xml(path, found)
        if content is None:
            continue
        size = [_number(*text, path, found) for text in zip(content.size, _SIZE)]
        if None in size:
            continue
        if not all(map(_is_size, size)):
            fault = f"has the size {size[0]:g} x {size[1]:g}, which are no numbers of pixels"
            found(Problem(problems.MALFORMED_ENTRY, f"{path} {fault}"))
            continue
        records.append({
            "file_name": os.path.join(dirname, "JPEGImages", f"{image_id}.jpg"),
            "height": int(size[1]),
            "width": int(size[0]),
            "image_id": image_id,
            "annotations": _voc_objects(content.objects, path, class_names, found),
        })
    return records


def _voc_objects(objects: Sequence[_XmlObject], path: str, class_names: Sequence[str], found: Found) -> list[dict]:
    annotations = []
    for number, item in enumerate(objects):
        where = f"{path}: object {number}"
        corners = [_number(*text, where, found) for text in zip(item.corners, _CORNERS)]
        if None in corners:
            continue
        if item.name not in class_names:
            fault = f"has the class {item.name!r}, which is not in the class list ({', '.join(class_names)})"
            found(Problem(problems.UNKNOWN_CLASS, f"{where} {fault}"))
            continue
        xmin, ymin, xmax, ymax = corners
        annotations.append({
            "category_id": class_names.index(item.name),
            # As Detectron2 reads them: the files' corners are 1-based pixels, the last ones included.
            "bbox": [xmin - 1, ymin - 1, xmax, ymax],
            "bbox_mode": BoxMode.XYXY_ABS,
            "difficult": item.difficult,
        })
    return annotations


def _voc_folder(dirname: str, name: str, found: Found) -> str | None:
    folder = os.path.join(dirname, name).rstrip(os.sep)
    if os.path.isdir(folder):
        return folder
    found(Problem(problems.MISSING_FOLDER, f"the folder {folder} is missing"))
    return None


def _voc_image_ids(dirname: str, split: str, found: Found) -> list[str]:
    if _voc_folder(dirname, "", found) is None:
        return []
    if None in [_voc_folder(dirname, name, found) for name in ("Annotations", "JPEGImages")]:
        return []
    split_file = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    try:
        with open(split_file, encoding="utf-8") as file:
            lines = [line.split() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError):
        found(Problem(problems.MISSING_SPLIT, f"the split file {split_file} is missing"))
        return []
    for words in lines:
        if len(words) > 1:
            found(Problem(problems.MALFORMED_SPLIT, f"{split_file} has the line {' '.join(words)!r}"))
    return [words[0] for words in lines]


class _XmlObject(NamedTuple):
    """An object of an annotation file of Pascal VOC; texts as they are written, None where there is none."""

    name: str | None
    corners: list[str | None]
    difficult: bool


class _Xml(NamedTuple):
    """What is used of an annotation file of Pascal VOC: the size's texts, width first, and the objects."""

    size: list[str | None]
    objects: list[_XmlObject]


def _read_xml(path: str, found: Found) -> _Xml | None:
    try:
        return _parsed(path)
    except OSError as error:
        found(Problem(problems.MISSING_XML, f"the annotation file {path} cannot be read ({error.strerror})"))
    except ElementTree.ParseError as error:
        found(Problem(problems.NOT_XML, f"the annotation file {path} is not valid XML ({error})"))
    return None


def _parsed(path: str) -> _Xml:
    status = os.stat(path)
    return _parse(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=None)  # the class names of a folder, and its splits, share the files
def _parse(path: str, mtime_ns: int, size: int) -> _Xml:
    tree = ElementTree.parse(path)
    return _Xml(
        [tree.findtext(tag) for tag in _SIZE],
        [
            _XmlObject(
                item.findtext("name"),
                [item.findtext(tag) for tag in _CORNERS],
                item.findtext("difficult", "0").strip() == "1",
            )
            for item in tree.findall("object")
        ],
    )


def forget_parsed_files() -> None:
    """Free what is kept of annotation files of Pascal VOC, so that several data sets of a folder read each but once."""
    _parse.cache_clear()


def _number(text: str | None, tag: str, where: str, found: Found) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        number = float(text)
        if math.isfinite(number):
            return number
    found(Problem(problems.MALFORMED_ENTRY, f"{where} has {text!r} as <{tag}> where a number is needed"))
    return None

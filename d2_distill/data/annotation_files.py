"""Reads annotation files leniently, and tells everything that is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from detectron2.structures import BoxMode

from ..errors import UserError
from . import problems
from .problems import Found, Kind, Problem, refusing

_COCO_SECTIONS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


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


def read_coco(
    json_file: str, image_root: str, found: Found, *, evaluated: bool
) -> tuple[list[dict], list[str]]:
    """Records in Detectron2's standard form, and the class names, of a COCO instance annotation file.

    What is malformed is told and left out. Annotations keep their ``id``.

    Args:
        found: takes each problem.
        evaluated: see :func:`coco_class_names`.
    """
    sections = _coco_sections(json_file, found, evaluated)
    class_of = {category["id"]: index for index, category in enumerate(sections["categories"])}
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sections["images"]
    }
    for row in sections["annotations"]:
        records[row["image_id"]]["annotations"].append({
            "id": row["id"],
            "bbox": row["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": class_of[row["category_id"]],
            "iscrowd": row.get("iscrowd", 0),
        })
    return list(records.values()), [category["name"] for category in sections["categories"]]


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


@functools.lru_cache()  # the splits of a folder share it
def _object_names(folder: str) -> tuple[str, ...]:
    names = set()
    for file_name in os.listdir(folder):
        if file_name.endswith(".xml"):
            with contextlib.suppress(OSError, ElementTree.ParseError):
                objects = ElementTree.parse(os.path.join(folder, file_name)).findall("object")
                names.update(item.findtext("name") for item in objects)
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
        tree = _read_xml(path, found)
        size = None if tree is None else [_number(tree, f"size/{tag}", path, found) for tag in ("width", "height")]
        if size is None or None in size:
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
            "annotations": _voc_objects(tree, path, class_names, found),
        })
    return records


def _voc_objects(tree, path: str, class_names: Sequence[str], found: Found) -> list[dict]:
    annotations = []
    for number, item in enumerate(tree.findall("object")):
        where = f"{path}: object {number}"
        corners = [_number(item, f"bndbox/{tag}", where, found) for tag in _CORNERS]
        if None in corners:
            continue
        name = item.findtext("name")
        if name not in class_names:
            fault = f"has the class {name!r}, which is not in the class list ({', '.join(class_names)})"
            found(Problem(problems.UNKNOWN_CLASS, f"{where} {fault}"))
            continue
        xmin, ymin, xmax, ymax = corners
        annotations.append({
            "category_id": class_names.index(name),
            # As Detectron2 reads them: the files' corners are 1-based pixels, the last ones included.
            "bbox": [xmin - 1, ymin - 1, xmax, ymax],
            "bbox_mode": BoxMode.XYXY_ABS,
            "difficult": item.findtext("difficult", "0").strip() == "1",
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


def _read_xml(path: str, found: Found):
    try:
        return ElementTree.parse(path)
    except OSError as error:
        found(Problem(problems.MISSING_XML, f"the annotation file {path} cannot be read ({error.strerror})"))
    except ElementTree.ParseError as error:
        found(Problem(problems.NOT_XML, f"the annotation file {path} is not valid XML ({error})"))
    return None


def _number(element, tag: str, where: str, found: Found) -> float | None:
    text = element.findtext(tag)
    with contextlib.suppress(TypeError, ValueError):
        number = float(text)
        if math.isfinite(number):
            return number
    found(Problem(problems.MALFORMED_ENTRY, f"{where} has {text!r} as <{tag}> where a number is needed"))
    return None

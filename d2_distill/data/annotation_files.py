"""Reads annotation files only to say, in one sentence, what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from ..errors import UserError

_COCO_SECTIONS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def coco_class_names(json_file: str, *, source: str) -> list[str]:
    """Class names of a COCO instance annotation file, in the order of their category ids.

    Args:
        json_file: path of the file.
        source: who names the file, e.g. ``"DATASETS.COCO (data set 'mine')"``; the errors begin with it.

    Raises:
        UserError: the file is missing, is not JSON, or is not a consistent COCO instance annotation file.
    """
    content = _read_json(json_file, source)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) for name in _COCO_SECTIONS
    ):
        raise UserError(
            f"{source}: {json_file} is not a COCO annotation file, which is an object with the lists "
            "'images', 'annotations' and 'categories'; convert it or name another file."
        )
    for section, fields in _COCO_SECTIONS.items():
        _check_rows(content[section], section, fields, f"{source}: {json_file}")
    categories = {row["id"]: row["name"] for row in content["categories"]}
    image_ids = {row["id"] for row in content["images"]}
    if len(set(categories.values())) < len(categories):
        raise UserError(
            f"{source}: {json_file} names two categories alike; make the names in 'categories' unique."
        )
    for row in content["annotations"]:
        where = f"{source}: {json_file}: annotation {row['id']}"
        if row["category_id"] not in categories:
            raise UserError(
                f"{where} has category_id {row['category_id']}, which is not among the 'categories'; "
                "add the category or remove the annotation."
            )
        if row["image_id"] not in image_ids:
            raise UserError(
                f"{where} has image_id {row['image_id']}, which is not among the 'images'; "
                "add the image or remove the annotation."
            )
        if not isinstance(row["bbox"], list) or len(row["bbox"]) != 4:
            raise UserError(f"{where} has the bbox {row['bbox']}; write it as [x, y, width, height].")
        if row.get("ignore", 0) != 0:
            raise UserError(
                f"{where} has 'ignore' set, which Detectron2 does not support; use 'iscrowd' or remove it."
            )
    return [categories[id] for id in sorted(categories)]


def _read_json(json_file: str, source: str):
    try:
        with open(json_file, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(
            f"{source}: the annotation file {json_file} cannot be read ({error.strerror}); correct its path, "
            "which is relative to $DETECTRON2_DATASETS (default: datasets), or put the file there."
        ) from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(
            f"{source}: the annotation file {json_file} is not valid JSON ({error}); restore or re-export it."
        ) from None


def _check_rows(rows: list, section: str, fields: Sequence[str], where: str) -> None:
    seen = set()
    for index, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise UserError(
                f"{where}: entry {index} of '{section}' lacks {missing[0]!r}; add it or re-export the file."
            )
        if not isinstance(row["id"], (int, str)):
            raise UserError(
                f"{where}: entry {index} of '{section}' has the id {row['id']!r}; write a number."
            )
        if row["id"] in seen:
            raise UserError(
                f"{where}: two entries of '{section}' have the id {row['id']}; make the ids unique."
            )
        seen.add(row["id"])


def check_voc_folder(dirname: str, split: str, *, source: str) -> list[str]:
    """Image ids that a split of a Pascal VOC folder lists.

    Args:
        dirname: folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: name of a file ``ImageSets/Main/<split>.txt``.
        source: see :func:`coco_class_names`.

    Raises:
        UserError: a folder or the split file is missing.
    """
    for name in ("", "Annotations", "JPEGImages"):
        _require_folder(dirname, name, source)
    split_file = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(split_file):
        raise UserError(
            f"{source}: the split file {split_file} is missing; write it, one image id a line."
        )
    with open(split_file, encoding="utf-8") as file:
        return file.read().split()


def _require_folder(dirname: str, name: str, source: str) -> str:
    folder = os.path.join(dirname, name).rstrip(os.sep)
    if not os.path.isdir(folder):
        raise UserError(
            f"{source}: the folder {folder} is missing; correct the path, which is relative to "
            "$DETECTRON2_DATASETS (default: datasets), or prepare the Pascal VOC layout there."
        )
    return folder


def voc_class_names(dirname: str, *, source: str) -> list[str]:
    """Sorted names of all objects in the ``Annotations`` of a Pascal VOC folder, whatever split they are in.

    So all splits of a folder agree. Files that are not XML are left to :func:`check_voc_annotations`.

    Raises:
        UserError: the folder is missing, or there is no object.
    """
    folder = _require_folder(dirname, "Annotations", source)
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
    return tuple(sorted(names - {None}))


def check_voc_annotations(dirname: str, split: str, class_names: Sequence[str], *, source: str) -> None:
    """Parse every XML file of a split.

    Raises:
        UserError: names the file that is missing, not XML, lacks a field or has another class.
    """
    for image_id in check_voc_folder(dirname, split, source=source):
        path = os.path.join(dirname, "Annotations", f"{image_id}.xml")
        try:
            tree = ElementTree.parse(path)
        except OSError as error:
            raise UserError(
                f"{source}: the annotation file {path} cannot be read ({error.strerror}); restore it, or "
                f"remove {image_id} from the split."
            ) from None
        except ElementTree.ParseError as error:
            raise UserError(
                f"{source}: the annotation file {path} is not valid XML ({error}); restore it."
            ) from None
        for tag in ("size/width", "size/height"):
            _number(tree, tag, where=f"{source}: {path}")
        for number, item in enumerate(tree.findall("object")):
            where = f"{source}: {path}: object {number}"
            for tag in ("xmin", "ymin", "xmax", "ymax"):
                _number(item, f"bndbox/{tag}", where=where)
            name = item.findtext("name")
            if name not in class_names:
                raise UserError(
                    f"{where} has the class {name!r}, which is not in the class list "
                    f"({', '.join(class_names)}); add it there or correct the file."
                )


def _number(element, tag: str, *, where: str) -> None:
    text = element.findtext(tag)
    try:
        float(text)
    except (TypeError, ValueError):
        raise UserError(
            f"{where} has {text!r} as <{tag}> where a number is needed; correct the file."
        ) from None

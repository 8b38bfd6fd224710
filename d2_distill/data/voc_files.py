"""Reads Pascal VOC folders leniently, and tells everything that is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from detectron2.structures import BoxMode

from ..errors import UserError
from . import problems
from .problems import Found, Problem, refusing
from .records import is_image_size

_SIZE = ("size/width", "size/height")
_CORNERS = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")


def check_voc_folder(dirname: str, split: str, *, source: str) -> list[str]:
    """Image ids that a split of a Pascal VOC folder lists.

    Args:
        dirname: folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: name of a file ``ImageSets/Main/<split>.txt``.
        source: see :func:`.coco_files.coco_class_names`.

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
    return tuple(sorted({name for name in names if name and name.strip()}))


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
        if not all(map(is_image_size, size)):
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
        if not item.name or not item.name.strip():
            found(Problem(problems.MALFORMED_ENTRY, f"{where} has no <name>"))
            continue
        if item.difficult not in ("", "0", "1"):
            fault = f"has {item.difficult!r} as <difficult> where 0 or 1 is needed"
            found(Problem(problems.MALFORMED_ENTRY, f"{where} {fault}"))
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
            "difficult": item.difficult == "1",
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
        leaves = os.path.isabs(words[0]) or ".." in words[0].replace("\\", "/").split("/")
        if len(words) > 1 or leaves:
            found(Problem(problems.MALFORMED_SPLIT, f"{split_file} has the line {' '.join(words)!r}"))
    for image_id, count in Counter(words[0] for words in lines if len(words) == 1).items():
        if count > 1:
            found(Problem(problems.REPEATED_ID, f"{split_file} lists {image_id} {count} times"))
    return [words[0] for words in lines]


class _XmlObject(NamedTuple):
    """An object of an annotation file of Pascal VOC; texts as they are written, None where there is none."""

    name: str | None
    corners: list[str | None]
    difficult: str


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
                item.findtext("difficult", "").strip(),
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

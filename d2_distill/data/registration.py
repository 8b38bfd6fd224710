"""Registers the user's own data sets, which the config names, with Detectron2."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from . import problems
from .coco_files import category_numbers, coco_truth, read_coco
from .loaded import Content, LoadedOnce
from .problems import Problem, refusing
from .voc_files import check_voc_folder, read_voc, voc_class_names

logger = logging.getLogger(__name__)

_COCO_FORM = "(name, json_file, image_root)"
_VOC_FORM = "(name, dirname, split, class_names, year)"


def register_datasets(cfg, names: Container | None = None) -> None:
    """Register the rows of ``DATASETS.COCO`` and ``DATASETS.VOC``; rows registered before are left alone.

    A COCO row is ``(name, json_file, image_root)``; its class list is that of the file, ordered by category
    id. A VOC row is ``(name, dirname, split, class_names, year)``; the year (2007, 2012) chooses the metric, and empty
    class names are ``DATASETS.CLASSES`` or, where these are empty too, those of :func:`.voc_files.voc_class_names`.
    Relative paths are below ``$DETECTRON2_DATASETS`` (default: ``datasets``). A COCO file is read here, files of Pascal
    VOC when their records are asked for; each only once, see :class:`.loaded.LoadedOnce`.

    Args:
        names: register only the rows of these names; None registers all.

    Raises:
        UserError: a malformed row, a missing or unusable file, or a name that another data set has already.
    """
    for key, register in (("COCO", _register_coco), ("VOC", _register_voc)):
        for row in cfg.DATASETS[key]:
            if names is None or row_name(row) in names:
                register(row, cfg)


def declared_names(cfg) -> set[str]:
    """Names of the data sets that the config itself registers."""
    return set(declared_rows(cfg))


def declared_rows(cfg) -> dict[str, Sequence]:
    """The rows of ``DATASETS.COCO`` and ``DATASETS.VOC`` by their names; those without a name are left out."""
    rows = {row_name(row): row for row in (*cfg.DATASETS.COCO, *cfg.DATASETS.VOC)}
    return {name: row for name, row in rows.items() if name is not None}


def row_name(row) -> str | None:
    """The name of the data set of a row; None of a malformed one."""
    return row[0] if isinstance(row, (list, tuple)) and row and isinstance(row[0], str) else None


class CocoFiles(NamedTuple):
    """A row of ``DATASETS.COCO``, paths resolved."""

    name: str
    json_file: str
    image_root: str


class VocFiles(NamedTuple):
    """A row of ``DATASETS.VOC``, paths resolved; ``class_names`` may be empty."""

    name: str
    dirname: str
    split: str
    class_names: Sequence[str]
    year: int


def declared_files(cfg, name: str) -> CocoFiles | VocFiles | None:
    """The row of a declared data set; None if it is not declared.

    Raises:
        UserError: a malformed row.
    """
    for key, parse in (("COCO", _coco_files), ("VOC", _voc_files)):
        for row in cfg.DATASETS[key]:
            if row_name(row) == name:
                return parse(row)
    return None


def resolved(path: str) -> str:
    """A path of the config: a relative one is below ``$DETECTRON2_DATASETS`` (default: ``datasets``)."""
    return os.path.join(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")), path)


def _coco_files(row) -> CocoFiles:
    if not _is_row(row, (str, str, str)):
        raise UserError(f"DATASETS.COCO has the row {row!r}; write it as {_COCO_FORM}, three strings.")
    _require_plain_name(row[0], "DATASETS.COCO")
    return CocoFiles(row[0], resolved(row[1]), resolved(row[2]))


def _voc_files(row) -> VocFiles:
    if not _is_row(row, (str, str, str, (list, tuple), int)) or not _is_row(row[3], (str,) * len(row[3])):
        raise UserError(
            f"DATASETS.VOC has the row {row!r}; write it as {_VOC_FORM}, e.g. "
            "('mine', 'voc/mine', 'train', ('cat', 'dog'), 2012)."
        )
    _require_plain_name(row[0], "DATASETS.VOC")
    files = VocFiles(row[0], resolved(row[1]), *row[2:])
    source = f"DATASETS.VOC (data set {files.name!r})"
    if files.year not in (2007, 2012):
        raise UserError(
            f"{source} has the year {files.year}; write 2007 (11-point AP) or 2012 (area under the curve)."
        )
    if len(set(files.class_names)) < len(files.class_names):
        raise UserError(f"{source} names a class twice in {files.class_names}; make the class names unique.")
    return files


def _require_plain_name(name: str, key: str) -> None:
    """
    Raises:
        UserError: the name could lead out of the folders of the files that are named after the data set.
    """
    if not re.fullmatch(r"[^/\\\0]+", name) or name.strip(".") == "":
        raise UserError(f"{key} has a data set of the name {name!r}; files are named after it, so use no slashes.")


def _register_coco(row, cfg) -> None:
    files = _coco_files(row)
    identity = {"evaluator_type": "coco", "json_file": files.json_file, "image_root": files.image_root}
    if _is_registered(files.name, identity, key="DATASETS.COCO"):
        return
    source = f"DATASETS.COCO (data set {files.name!r})"
    if not os.path.isdir(files.image_root):
        raise UserError(
            f"{source}: the image folder {files.image_root} is missing; correct its path, which is relative to "
            "$DETECTRON2_DATASETS (default: datasets)."
        )
    evaluated, with_masks = files.name in cfg.DATASETS.TEST, cfg.MODEL.MASK_ON

    def read(asks: str) -> Content:
        return _coco_content(files, asks or source, evaluated=evaluated, with_masks=with_masks)

    entry = LoadedOnce(files.name, read)
    if "thing_classes" not in entry.metadata:
        entry.records()
    _register(entry, files.name, identity)


def _coco_content(files: CocoFiles, source: str, *, evaluated: bool, with_masks: bool) -> Content:
    refuse, left_out = refusing(source), []

    def found(problem: Problem) -> None:
        refuse(problem)
        if problem.kind is problems.NO_POLYGON:
            left_out.append(problem)

    content = read_coco(files.json_file, files.image_root, found, evaluated=evaluated, with_masks=with_masks)
    if left_out:
        logger.warning("%s: %d %s are left out.", source, len(left_out), problems.NO_POLYGON.title)
    numbers = category_numbers(content.sections["categories"])
    metadata = {"thing_classes": content.class_names, "thing_dataset_id_to_contiguous_id": numbers}
    truth = coco_truth(content.sections, with_masks=with_masks) if evaluated else None
    return Content(content.records, metadata, truth)


def _register_voc(row, cfg) -> None:
    files = _voc_files(row)
    source = f"DATASETS.VOC (data set {files.name!r})"
    class_names = list(files.class_names or cfg.DATASETS.CLASSES)
    identity = {"evaluator_type": "pascal_voc", "dirname": files.dirname, "split": files.split, "year": files.year}
    classes = {"thing_classes": class_names} if class_names else {}
    if _is_registered(files.name, {**identity, **classes}, key="DATASETS.VOC"):
        return

    def read(asks: str) -> Content:
        return Content(read_voc(files.dirname, files.split, names, refusing(asks or source)), {})

    entry = LoadedOnce(files.name, read)
    names = class_names or entry.metadata.get("thing_classes") or voc_class_names(files.dirname, source=source)
    check_voc_folder(files.dirname, files.split, source=source)
    entry.add_metadata({"thing_classes": names})
    _register(entry, files.name, identity)


def _register(entry: LoadedOnce, name: str, metadata: dict[str, Any]) -> None:
    DatasetCatalog.register(name, entry)
    MetadataCatalog.get(name).set(**metadata)


def _is_row(row, types: Sequence) -> bool:
    return (
        isinstance(row, (list, tuple))
        and len(row) == len(types)
        and all(isinstance(value, type_) for value, type_ in zip(row, types))
    )


def _is_registered(name: str, identity: dict, *, key: str) -> bool:
    """Whether ``name`` is this very data set already; UserError if it is another one."""
    if name not in DatasetCatalog.list():
        return False
    metadata = MetadataCatalog.get(name)
    differing = {
        field: metadata.get(field, None) for field in identity if metadata.get(field, None) != identity[field]
    }
    if differing:
        field, value = next(iter(differing.items()))
        raise UserError(
            f"{key} names the data set {name!r}, which is registered already with {field} {value!r} "
            f"(not {identity[field]!r}); choose another name."
        )
    return True

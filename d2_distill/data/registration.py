"""Registers the user's own data sets, which the config names, with Detectron2."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc

from ..errors import UserError
from .annotation_files import check_voc_folder, coco_class_names, voc_class_names

_COCO_FORM = "(name, json_file, image_root)"
_VOC_FORM = "(name, dirname, split, class_names, year)"


def register_datasets(cfg, names: Container | None = None) -> None:
    """Register the rows of ``DATASETS.COCO`` and ``DATASETS.VOC``; rows registered before are left alone.

    A COCO row is ``(name, json_file, image_root)``; its class list is that of the file, ordered by category
    id. A VOC row is ``(name, dirname, split, class_names, year)``; the year (2007, 2012) chooses the metric, and empty
    class names are ``DATASETS.CLASSES`` or, where these are empty too, those of :func:`.annotation_files.voc_class_names`.
    Relative paths are below ``$DETECTRON2_DATASETS`` (default: ``datasets``).

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
    return CocoFiles(row[0], resolved(row[1]), resolved(row[2]))


def _voc_files(row) -> VocFiles:
    if not _is_row(row, (str, str, str, (list, tuple), int)) or not _is_row(row[3], (str,) * len(row[3])):
        raise UserError(
            f"DATASETS.VOC has the row {row!r}; write it as {_VOC_FORM}, e.g. "
            "('mine', 'voc/mine', 'train', ('cat', 'dog'), 2012)."
        )
    files = VocFiles(row[0], resolved(row[1]), *row[2:])
    source = f"DATASETS.VOC (data set {files.name!r})"
    if files.year not in (2007, 2012):
        raise UserError(
            f"{source} has the year {files.year}; write 2007 (11-point AP) or 2012 (area under the curve)."
        )
    if len(set(files.class_names)) < len(files.class_names):
        raise UserError(f"{source} names a class twice in {files.class_names}; make the class names unique.")
    return files


def _register_coco(row, cfg) -> None:
    name, json_file, image_root = _coco_files(row)
    identity = {"evaluator_type": "coco", "json_file": json_file, "image_root": image_root}
    if _is_registered(name, identity, key="DATASETS.COCO"):
        return
    source = f"DATASETS.COCO (data set {name!r})"
    class_names = coco_class_names(json_file, source=source, evaluated=name in cfg.DATASETS.TEST)
    if not os.path.isdir(image_root):
        raise UserError(
            f"{source}: the image folder {image_root} is missing; correct its path, which is relative to "
            "$DETECTRON2_DATASETS (default: datasets)."
        )
    register_coco_instances(name, {"thing_classes": class_names}, json_file, image_root)


def _register_voc(row, cfg) -> None:
    name, dirname, split, class_names, year = _voc_files(row)
    source = f"DATASETS.VOC (data set {name!r})"
    class_names = list(class_names or cfg.DATASETS.CLASSES or voc_class_names(dirname, source=source))
    identity = {
        "evaluator_type": "pascal_voc",
        "dirname": dirname,
        "split": split,
        "year": year,
        "thing_classes": class_names,
    }
    if _is_registered(name, identity, key="DATASETS.VOC"):
        return
    check_voc_folder(dirname, split, source=source)
    register_pascal_voc(name, dirname, split, year, class_names=class_names)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"


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

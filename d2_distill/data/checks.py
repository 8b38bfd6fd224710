"""Checks the data sets of a run before it starts, and says in one sentence what is wrong."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import UserError
from .annotation_files import check_voc_annotations, coco_class_names
from .registration import declared_names

_FIELDS = ("file_name", "height", "width", "annotations")


def check_datasets(cfg, *, train: bool = True) -> None:
    """Check every data set of ``DATASETS.TRAIN`` and ``DATASETS.TEST``; no image is decoded.

    The data sets must be registered (:func:`.registration.register_datasets`). In those that the config does
    not declare, useless boxes are only logged: COCO 2017 has some, and Detectron2 leaves them out.

    Args:
        train: False leaves ``DATASETS.TRAIN`` aside, for an evaluation.

    Raises:
        UserError: see :func:`check_dataset`; no training data, or class lists that differ from each other or from
            ``DATASETS.CLASSES``.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; name a registered data set, or your own in DATASETS.COCO.")
    declared, checked = declared_names(cfg), {}
    keys = ("DATASETS.TRAIN", "DATASETS.TEST") if train else ("DATASETS.TEST",)
    for key in keys:
        for name in cfg.DATASETS.TRAIN if key == "DATASETS.TRAIN" else cfg.DATASETS.TEST:
            if name in checked:
                continue
            class_names = check_dataset(name, key=key, strict=name in declared)
            _check_same_classes(name, class_names, checked, key)
            _check_classes_of_detector(name, class_names, cfg.DATASETS.CLASSES, key)
            checked[name] = class_names


def check_dataset(name: str, *, key: str, strict: bool = True) -> list[str]:
    """Check one registered data set; ``key`` is the config key that names it.

    Args:
        key: ``"DATASETS.TRAIN"`` also asks for boxes to learn from.
        strict: False only logs boxes of zero area or outside their image.

    Returns:
        The class names.

    Raises:
        UserError: unknown name, unreadable or empty data set, malformed record, missing image file, category
            outside the class list, box that is not finite, has no area or lies outside its image, no box to
            learn from.
    """
    source = f"{key}: data set {name!r}"
    records = _load(name, key, source)
    if not records:
        raise UserError(f"{source} is empty; correct its annotation file or split, or name another data set.")
    for index, record in enumerate(records):
        missing = [field for field in _FIELDS if field not in record]
        if missing:
            raise UserError(
                f"{source}: record {index} ({record.get('file_name')}) lacks {missing[0]!r}; "
                "correct the function that loads the data set."
            )
    _check_files(records, source)
    class_names = list(MetadataCatalog.get(name).get("thing_classes", []))
    usable = _check_annotations(records, class_names, source, strict)
    if key == "DATASETS.TRAIN" and not usable:
        raise UserError(
            f"{source} has {len(records)} images, but none with a usable (non-crowd) box; annotate some."
        )
    return class_names


def _load(name: str, key: str, source: str) -> list[dict]:
    registered = DatasetCatalog.list()
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "add it to DATASETS.COCO or DATASETS.VOC."
        raise UserError(f"{key} names the data set {name!r}, which is not registered; {hint}")
    try:
        return DatasetCatalog.get(name)
    except Exception as error:  # whatever a loading function stumbles over is the data's fault: say what
        metadata = MetadataCatalog.get(name)
        if hasattr(metadata, "json_file"):
            coco_class_names(metadata.json_file, source=source)
        elif hasattr(metadata, "dirname"):
            check_voc_annotations(metadata.dirname, metadata.split, metadata.thing_classes, source=source)
        raise UserError(
            f"{source} cannot be loaded ({type(error).__name__}: {error}); correct its files."
        ) from error


def _check_files(records: Sequence[dict], source: str) -> None:
    missing = [record["file_name"] for record in records if not os.path.isfile(record["file_name"])]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(records)} image files are missing, the first is {missing[0]}; "
            "correct the image folder or restore the files."
        )


def _check_annotations(records: Sequence[dict], class_names: Sequence[str], source: str, strict: bool) -> int:
    """Number of boxes to learn from."""
    pairs = [(record, number) for record in records for number in range(len(record["annotations"]))]
    if not pairs:
        return 0
    annotations = [record["annotations"][number] for record, number in pairs]

    def refuse(index: int, fault: str, remedy: str) -> None:
        record, number = pairs[index]
        raise UserError(f"{source}: image {record['file_name']}, annotation {number}: {fault}; {remedy}.")

    for index, annotation in enumerate(annotations):
        if len(annotation.get("bbox", ())) != 4:
            refuse(index, f"the box is {annotation.get('bbox')}", "give it four numbers")
        category = annotation["category_id"]
        if not 0 <= category < len(class_names):
            fault = f"category {category} is outside the class list of {len(class_names)} classes"
            refuse(index, fault, "correct the category or the class list")

    boxes = _boxes_xyxy(annotations)
    finite = np.isfinite(boxes).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        refuse(first, f"the box {annotations[first]['bbox']} is not finite", "correct it")
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations])
    size = np.array([(record["width"], record["height"]) for record, _ in pairs], dtype=np.float64)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    inside = (np.minimum(boxes[:, 2:], size) > np.maximum(boxes[:, :2], 0)).all(axis=1)
    for good, fault in ((has_area, "has no area"), (inside, "lies outside the image of {:.0f} x {:.0f}")):
        bad = ~good & ~crowd
        if bad.any() and strict:
            first = int(np.argmax(bad))
            box = annotations[first]["bbox"]
            refuse(first, f"the box {box} {fault.format(*size[first])}", "correct or remove it")
    useless = ~(has_area & inside) & ~crowd
    if useless.any():
        logging.getLogger(__name__).warning(
            "%s: %d boxes have no area or lie outside their image.", source, useless.sum()
        )
    return int((has_area & inside & ~crowd).sum())


def _boxes_xyxy(annotations: Sequence[dict]) -> np.ndarray:
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    modes = np.array([annotation["bbox_mode"] for annotation in annotations])
    for mode in set(modes.tolist()):
        boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes


def _check_same_classes(
    name: str, class_names: Sequence[str], checked: dict[str, list[str]], key: str
) -> None:
    for other, other_names in checked.items():
        if list(class_names) != other_names:
            raise UserError(
                f"{key}: data set {name!r} has another class list than {other!r} "
                f"({_difference(class_names, other_names)}); give both the same categories, ids included."
            )


def _check_classes_of_detector(name: str, class_names: Sequence[str], expected: Sequence[str], key: str) -> None:
    if expected and list(class_names) != list(expected):
        raise UserError(
            f"{key}: data set {name!r} has another class list than the detector, whose classes are DATASETS.CLASSES or, "
            f"where the config leaves them empty, those of its training set ({_difference(class_names, expected)}); "
            f"give both the same names in the same order, which in COCO files is that of the category ids."
        )


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    differing = sorted(set(ours) ^ set(theirs))
    return f"they differ in {', '.join(differing[:5])}" if differing else "the same in another order"

"""Checks the data sets of a run before it starts, and says in one sentence what is wrong."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from tabulate import tabulate

from ..errors import UserError
from . import problems
from .coco_files import coco_class_names
from .loaded import LoadedOnce, load_once, without_collection
from .problems import Found, Problem, refusing
from .records import check_image_files, check_records, is_crowd, usable_boxes
from .registration import declared_names
from .voc_files import check_voc_annotations

logger = logging.getLogger(__name__)


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
        raise UserError(
            "DATASETS.TRAIN is empty; name a registered data set, your own in DATASETS.COCO or DATASETS.VOC, or --train-data."
        )
    declared, checked = declared_names(cfg), {}
    keys = ("DATASETS.TRAIN", "DATASETS.TEST") if train else ("DATASETS.TEST",)
    for key in keys:
        for name in cfg.DATASETS.TRAIN if key == "DATASETS.TRAIN" else cfg.DATASETS.TEST:
            if name in checked:
                continue
            require_registered(name, key, declared)
            class_names = check_dataset(name, key=key, strict=name in declared)
            compare_classes(name, class_names, checked, cfg.DATASETS.CLASSES, refusing(key))
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
    refuse, useless = refusing(source), []

    def found(problem: Problem) -> None:
        if not strict and problem.kind in (problems.NO_AREA, problems.OUTSIDE):
            useless.append(problem)
        else:
            refuse(problem)

    entry = _load(name, key, source)
    class_names = list(MetadataCatalog.get(name).get("thing_classes", []))
    with without_collection():
        if not entry.handed_over:
            records = entry()
            usable = check_records(records, class_names, found)
            check_content(records, usable, found, train=key == "DATASETS.TRAIN")
            logger.info("%s has %s", source, _summary(usable, class_names))
        elif comm.get_local_rank() == 0:  # on another machine than the process that has checked the rest
            check_image_files(entry(), found)
    if useless:
        logger.warning("%s: %d boxes have no area or lie outside their image.", source, len(useless))
    return class_names


def _summary(records: Sequence[dict], class_names: Sequence[str]) -> str:
    """Return the numbers of images and boxes, those of each class in a table of three columns."""
    classes = [row["category_id"] for record in records for row in record["annotations"] if not is_crowd(row)]
    empty = sum(all(map(is_crowd, record["annotations"])) for record in records)
    counts = np.bincount(np.array(classes, dtype=int), minlength=len(class_names)).tolist()
    cells = [cell for pair in zip(class_names, counts) for cell in pair]
    table = tabulate([cells[start : start + 6] for start in range(0, len(cells), 6)], tablefmt="plain")
    return f"{len(classes)} boxes in {len(records)} images, {empty} of them without any:\n{table}"


def check_content(records: Sequence[dict], usable: Sequence[dict], found: Found, *, train: bool) -> None:
    """Tell whether there is too little in a data set.

    Args:
        records: all of it.
        usable: what :func:`.records.check_records` returned.
        train: whether boxes to learn from are needed.
    """
    if not records:
        found(Problem(problems.EMPTY, "it is empty"))
    elif train and not usable_boxes(usable):
        fault = f"it has {len(records)} images, but none with a usable (non-crowd) box"
        found(Problem(problems.NOTHING_TO_LEARN, fault))


def compare_classes(
    name: str, class_names: Sequence[str], others: Mapping[str, Sequence[str]], expected: Sequence[str], found: Found
) -> None:
    """Tell whether a data set has another class list than others or than the detector.

    Args:
        others: class lists by the names of their data sets.
        expected: ``DATASETS.CLASSES``; empty if unknown.
    """
    for other, other_names in others.items():
        if list(class_names) != list(other_names):
            fault = f"than {other!r} ({_difference(class_names, other_names)})"
            break
    else:
        if not expected or list(class_names) == list(expected):
            return
        fault = (
            f"than DATASETS.CLASSES, the detector's, which where the config leaves them empty are those of its training "
            f"set ({_difference(class_names, expected)})"
        )
    found(Problem(problems.OTHER_CLASSES, f"data set {name!r} has another class list {fault}"))


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    differing = sorted(set(ours) ^ set(theirs))
    return f"they differ in {', '.join(differing[:5])}" if differing else "the same in another order"


def _load(name: str, key: str, source: str) -> LoadedOnce:
    require_registered(name, key)
    entry = load_once(name)
    try:
        entry.records(source)
    except UserError:
        raise
    except Exception as error:  # whatever a loading function stumbles over is the data's fault: say what
        metadata = MetadataCatalog.get(name)
        if hasattr(metadata, "json_file"):
            coco_class_names(metadata.json_file, source=source)
        elif hasattr(metadata, "dirname"):
            check_voc_annotations(metadata.dirname, metadata.split, metadata.thing_classes, source=source)
        raise UserError(
            f"{source} cannot be loaded ({type(error).__name__}: {error}); correct its files."
        ) from error
    return entry


def require_registered(name: str, key: str, declared: Iterable[str] = ()) -> None:
    """
    Args:
        declared: names of data sets that might be meant, too, although they are not registered.

    Raises:
        UserError: no data set has this name; ``key`` is the config key that does.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        close = difflib.get_close_matches(name, {*registered, *declared}, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "add it to DATASETS.COCO or DATASETS.VOC."
        raise UserError(f"{key} names the data set {name!r}, which is not registered; {hint}")

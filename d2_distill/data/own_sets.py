"""Data sets that are given by their paths alone, as on a command line."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence

from detectron2.config import CfgNode

from ..errors import UserError
from .registration import declared_rows, resolved, row_name

logger = logging.getLogger(__name__)
_VOC_YEAR = 2012  # area under the curve, as newer protocols have it


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--train-data`` and ``--test-data``, lists of pairs of words; see :func:`name_data`."""
    for option, use in (("--train-data", "to train on"), ("--test-data", "to evaluate on")):
        parser.add_argument(
            option, nargs=2, action="append", default=[], metavar=("ANNOTATIONS", "IMAGES"),
            help=f"data set {use}: a COCO annotation file and its image folder, or a Pascal VOC folder and the name of "
            "a split; relative to the working directory or to $DETECTRON2_DATASETS; may be repeated",
        )


def name_data(cfg: CfgNode, train_data: Sequence[Sequence[str]], test_data: Sequence[Sequence[str]]) -> None:
    """Declare data sets in ``DATASETS.COCO`` and ``DATASETS.VOC``, and put them in the place of the config's own.

    Training data without test data also empty ``DATASETS.TEST``; test data alone leave ``DATASETS.TRAIN`` as it is. Rows
    of the config that are used no more are taken out. A set's name is made of the last parts of its path. The classes
    of a Pascal VOC folder are ``DATASETS.CLASSES`` or, if empty, those that its files name.

    Args:
        train_data, test_data: pairs of a COCO annotation file and an image folder, or of a Pascal VOC folder and a
            split. A path that is not in the working directory is below ``$DETECTRON2_DATASETS`` (default: ``datasets``).

    Raises:
        UserError: a path does not exist.
    """
    train, test = (
        tuple(_declare(cfg, f"--{kind}-data", *words) for words in pairs)
        for kind, pairs in (("train", train_data), ("test", test_data))
    )
    if train:
        cfg.DATASETS.TRAIN = train
        if cfg.DATASETS.TEST and not test:
            logger.info("There is no --test-data, so DATASETS.TEST is emptied and nothing is evaluated.")
    if train or test:
        cfg.DATASETS.TEST = test
        used = (None, *cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)  # None: a malformed row, which is complained of later
        for kind in ("COCO", "VOC"):  # the data that the config was written for need not be here
            cfg.DATASETS[kind] = tuple(row for row in cfg.DATASETS[kind] if row_name(row) in used)


def _declare(cfg: CfgNode, option: str, first: str, second: str) -> str:
    """Add a row for a data set; its name."""
    path = _existing(first)
    if path is None:
        raise UserError(
            f"{option}: there is no {first} in the working directory or below $DETECTRON2_DATASETS (default: datasets); "
            "name a COCO annotation file and its image folder, or a Pascal VOC folder and a split."
        )
    if os.path.isdir(resolved(path)):
        if second.endswith(".json"):
            raise UserError(f"{option}: {first} is a folder; name the annotation file {second} first.")
        parts = [os.path.basename(os.path.abspath(resolved(path))), second]
        return _add(cfg, "VOC", parts, (path, second, (), _VOC_YEAR))
    images = _existing(second)
    if images is None or not os.path.isdir(resolved(images)):
        raise UserError(
            f"{option}: there is no folder {second} in the working directory or below $DETECTRON2_DATASETS (default: "
            f"datasets); name the image folder of {first}."
        )
    absolute = os.path.splitext(os.path.abspath(resolved(path)))[0]
    parts = [part for part in absolute.split(os.sep) if part not in ("", "annotations")]
    return _add(cfg, "COCO", parts[-2:], (path, images))


def _existing(path: str) -> str | None:
    """The path as the config should have it: absolute if it is in the working directory; None if it does not exist."""
    if os.path.exists(path):
        return os.path.abspath(path)
    return path if os.path.exists(resolved(path)) else None


def _add(cfg: CfgNode, kind: str, parts: Sequence[str], values: tuple) -> str:
    """Add a row unless it is there; its name, which is made of parts of the path and differs from those of others."""
    rows = declared_rows(cfg)
    base = name = re.sub(r"[^\w.-]+", "_", "_".join(parts))
    number = 1
    while name in rows and tuple(rows[name][1:3]) != values[:2]:
        number += 1
        name = f"{base}_{number}"
    if name not in rows:
        cfg.DATASETS[kind] = (*cfg.DATASETS[kind], (name, *values))
    return name

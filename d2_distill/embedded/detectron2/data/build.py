"""The dataset dicts that a config names, and the loader for testing."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
from tabulate import tabulate
from torch.utils import data

from .catalog import DatasetCatalog, MetadataCatalog
from .common import DatasetFromList, MapDataset
from .dataset_mapper import DatasetMapper
from .samplers import InferenceSampler

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(names: str | Sequence[str], filter_empty: bool = True) -> list[dict]:
    """Dataset dicts of one or several registered data sets, one after the other.

    Args:
        names: registered name(s).
        filter_empty: leave out images that have no annotation but crowds.

    Raises:
        AssertionError: a data set, or all that is left of them, is empty; a category id is not in 0..K-1.
        ValueError: the ``thing_classes`` of the data sets differ.
    """
    names = [names] if isinstance(names, str) else list(names)
    per_dataset = [DatasetCatalog.get(name) for name in names]
    for name, dicts in zip(names, per_dataset):
        assert len(dicts), f"Data set '{name}' is empty."
    dataset_dicts = list(itertools.chain.from_iterable(per_dataset))

    if filter_empty:
        usable = [record for record in dataset_dicts if _is_usable(record)]
        logger.info(f"{len(usable)} of {len(dataset_dicts)} images have annotations to learn from.")
        dataset_dicts = usable
    class_names = MetadataCatalog.get(names[0]).get("thing_classes")
    for name in names[1:]:
        other = MetadataCatalog.get(name).get("thing_classes")
        if other != class_names:
            raise ValueError(f"Data sets '{names[0]}' and '{name}' cannot be used together: their classes "
                             f"differ, {class_names} and {other}.")
    if class_names is not None:
        _log_once("Objects of each class:\n" + _class_table(dataset_dicts, class_names))
    assert len(dataset_dicts), f"No image with annotations is left in {', '.join(names)}."
    return dataset_dicts


def _is_usable(record: dict) -> bool:
    """Whether a record has an object that is not a crowd, or is without annotations by intention."""
    return "annotations" not in record or not all(a.get("iscrowd", 0) for a in record["annotations"])


@functools.lru_cache()  # each evaluation asks for the data again
def _log_once(message: str) -> None:
    logger.info(message)


def _class_table(dataset_dicts: list[dict], class_names: Sequence[str]) -> str:
    """How many objects (crowds not counted) each class has, three classes a line."""
    classes = np.array([
        annotation["category_id"]
        for record in dataset_dicts for annotation in record.get("annotations", [])
        if not annotation.get("iscrowd", 0)
    ], dtype=int)
    for category_id in {classes.min(initial=0), classes.max(initial=0)}:
        assert 0 <= category_id < len(class_names), \
            f"There is a category id {category_id}, but there are {len(class_names)} classes."
    counts = np.bincount(classes, minlength=len(class_names)).tolist()
    cells: list[Any] = [cell for pair in zip(class_names, counts) for cell in pair] + ["total", sum(counts)]
    return tabulate([cells[i : i + 6] for i in range(0, len(cells), 6)], tablefmt="plain", numalign="left")


def trivial_batch_collator(batch: Any) -> Any:
    """A batch is the list of its elements: images of different sizes cannot be stacked here."""
    return batch


def build_detection_test_loader(cfg, dataset_name: str, mapper: Callable | None = None) -> data.DataLoader:
    """Each image of a data set once, one a batch; each process gets its share.

    Args:
        mapper: function of a dataset dict, by default ``DatasetMapper(cfg, is_train=False)``.
    """
    dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    dataset = MapDataset(DatasetFromList(dicts), mapper or DatasetMapper(cfg, False))
    return data.DataLoader(
        dataset, batch_size=1, sampler=InferenceSampler(len(dataset)), num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator)

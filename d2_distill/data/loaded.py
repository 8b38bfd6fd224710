"""Each data set is read once: what was read, and checked, is what Detectron2's catalog gives from then on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Container, Iterator, Sequence
from typing import Any, Callable, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from .packed import PackedRecords


class Content(NamedTuple):
    """What reading a data set gives.

    Attributes:
        records: in Detectron2's standard form.
        metadata: what the read adds to the data set's metadata, e.g. the class names.
        truth: what the evaluator compares with, see :func:`.coco_files.coco_truth`; None if it reads its own file.
    """

    records: Sequence[dict[str, Any]]
    metadata: dict[str, Any]
    truth: bytes | None = None


class HandedOver(NamedTuple):
    """What one process gives the others of a run instead of their own read.

    Attributes:
        records: None of a data set that the run only takes the class names of.
        metadata: see :class:`Content`.
    """

    records: PackedRecords | None = None
    metadata: dict[str, Any] = {}


class LoadedOnce:
    """What replaces, in the ``DatasetCatalog``, the function that loads a data set.

    Attributes:
        metadata: see :class:`Content`.
        truth: the same; None before the read, and in a process that the data set was handed over to.
        handed_over: whether another process has read, and checked, the data set.
    """

    def __init__(self, name: str, read: Callable[[str], Content]) -> None:
        """
        Args:
            name: of the data set.
            read: takes who asks for the data, with which its errors begin; empty if unknown.
        """
        self._name, self._read = name, read
        given = _handed_over.pop(name, HandedOver())
        self._records = given.records
        self.handed_over = given.records is not None
        self.truth: bytes | None = None
        self.metadata: dict[str, Any] = {}
        self.add_metadata(given.metadata)

    def __call__(self) -> list[dict[str, Any]]:
        return self.records().unpacked()

    def records(self, source: str = "") -> PackedRecords:
        """Return the records, which are read if they were not before.

        Args:
            source: who asks for the data, for the errors.
        """
        if self._records is None:
            with without_collection():
                content = self._read(source)
                records = PackedRecords.of(content.records)
            self.add_metadata(content.metadata)
            self._records, self.truth = records, content.truth
        return self._records

    def add_metadata(self, values: dict[str, Any]) -> None:
        """Add to the data set's metadata what is known of it from reading it."""
        self.metadata.update(values)
        MetadataCatalog.get(self._name).set(**values)

    def release(self) -> None:
        """Forget all but the metadata."""
        self._records, self.truth, self.handed_over = None, None, False

    def to_hand_over(self) -> HandedOver:
        """Return what other processes need."""
        return HandedOver(self._records, self.metadata)


_handed_over: dict[str, HandedOver] = {}


def load_once(name: str) -> LoadedOnce:
    """Return what stands in the catalog for a registered data set, whoever has registered it."""
    function = DatasetCatalog[name]
    if not isinstance(function, LoadedOnce):

        def read(source: str) -> Content:
            metadata = MetadataCatalog.get(name)
            before = set(vars(metadata))
            records = function()
            return Content(records, {key: value for key, value in vars(metadata).items() if key not in before})

        DatasetCatalog[name] = LoadedOnce(name, read)
    return DatasetCatalog[name]


def keep_only(names: Container[str]) -> None:
    """Forget the records of all other data sets; they are read again if someone asks for them."""
    for name, entry in _entries().items():
        if name not in names:
            entry.release()


def all_to_hand_over() -> dict[str, HandedOver]:
    """Return what other processes need of all data sets that this one has read, or has kept the metadata of."""
    return {name: entry.to_hand_over() for name, entry in _entries().items()}


@contextlib.contextmanager
def handed_over(given: dict[str, HandedOver]) -> Iterator[None]:
    """Context manager: data sets that are registered or asked for inside are not read, but taken from ``given``."""
    _handed_over.update(given)
    try:
        yield
    finally:
        _handed_over.clear()


def _entries() -> dict[str, LoadedOnce]:
    return {name: entry for name, entry in DatasetCatalog.items() if isinstance(entry, LoadedOnce)}


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Context manager: switch Python's garbage collector off, whose passes over millions of new dicts find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""Data sets made of others: from a list, mapped, batched by aspect ratio."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator
from typing import Any, Callable

import numpy as np
import torch
from torch.utils import data


class DatasetFromList(data.Dataset):
    """Copies of the elements of a list, kept pickled in one tensor.

    Worker processes share it without copying; the reference counts of many small objects would make forked
    workers copy them page by page.
    """

    def __init__(self, lst: list):
        pickled = [np.frombuffer(pickle.dumps(x, protocol=-1), dtype=np.uint8) for x in lst]
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, pickled)], dtype=np.int64))
        self._bytes = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *pickled]))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(memoryview(self._bytes[self._ends[index] : self._ends[index + 1]].numpy()))


class MapDataset(data.Dataset):
    """``map_func`` applied to a data set's elements; an element of which it makes None is left out.

    A random other element takes its place; those that were left out before are not tried again. Of an iterable data set the
    result is iterable, too, and goes on with the next element.

    Raises:
        ValueError: all elements are left out.
    """

    def __new__(cls, dataset: data.Dataset, map_func: Callable):
        return _MappedStream(dataset, map_func) if isinstance(dataset, data.IterableDataset) else super().__new__(cls)

    def __init__(self, dataset: data.Dataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = map_func
        self._random = random.Random(42)
        self._left_out: set[int] = set()

    def __getnewargs__(self):
        return self._dataset, self._map_func

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        while True:
            mapped = self._map_func(self._dataset[index])
            if mapped is not None:
                self._left_out.discard(index)
                return mapped
            self._left_out.add(index)
            candidates = [other for other in range(len(self)) if other not in self._left_out]
            if not candidates:
                raise ValueError("The map function returned None for every element of the data set.")
            index = self._random.choice(candidates)


class _MappedStream(data.IterableDataset):
    """What is made of the elements of an iterable data set, where it is not None."""

    def __init__(self, dataset: data.IterableDataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = map_func

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return (mapped for mapped in map(self._map_func, self._dataset) if mapped is not None)


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches (lists) of dicts that are all wider than high, or all not, which saves padding.

    A batch is yielded as soon as one of the two groups is full; what is left at the end never is.
    """

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[dict]]:
        groups: dict[bool, list[dict]] = {True: [], False: []}
        for record in self.dataset:
            wide = record["width"] > record["height"]
            groups[wide].append(record)
            if len(groups[wide]) == self.batch_size:
                yield groups[wide]
                groups[wide] = []

"""Data sets made of others: from a list, mapped, batched by aspect ratio."""

from __future__ import annotations

import logging
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


MANY_NONES = 4  # of a mapper in a row, from which on it is worth a warning


class MapDataset(data.Dataset):
    """``map_func`` applied to a data set's elements; where it returns None another element takes the place.

    Indexing raises RuntimeError if it returns None for every element.
    """

    def __init__(self, dataset: data.Dataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = map_func

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        mapped = self._map_func(self._dataset[index])
        if mapped is not None:
            return mapped
        others = [other for other in range(len(self)) if other != index]
        # The same ones each time, so that runs repeat.
        random.Random(index).shuffle(others)
        for tried, other in enumerate(others, start=2):
            mapped = self._map_func(self._dataset[other])
            if mapped is not None:
                return mapped
            if tried == MANY_NONES:
                logging.getLogger(__name__).warning(f"The mapper returned None {tried} times for element {index} and others.")
        raise RuntimeError("The mapper returns None for every element of the data set.")


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

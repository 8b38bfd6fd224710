"""Records of a data set, packed into one tensor."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .records import is_crowd


class Index(NamedTuple):
    """What is known of N packed records without unpacking them.

    Attributes:
        ends: (N + 1,) int64, where each record starts and, last, where the content ends.
        sizes: (N, 2) widths and heights; 0 where a record lacks them.
        has_objects: (N,) bool, whether a record has an annotation that is not a crowd.
    """

    ends: np.ndarray
    sizes: np.ndarray
    has_objects: np.ndarray


class PackedRecords(Dataset):
    """Records in Detectron2's standard form, pickled one after the other; each access returns a new copy.

    Forked worker processes share the tensor, whereas reference counts would make them copy a list of dicts page by page.

    Args:
        content: (B,) uint8, the pickled records.
        index: of the content.
    """

    def __init__(self, content: torch.Tensor, index: Index) -> None:
        self.content = content
        self.index = index

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> PackedRecords:
        """Pack records, whose values must be picklable."""
        content, ends, sizes, has_objects = bytearray(), [0], [], []
        for record in records:
            content += pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
            sizes.append((record.get("width", 0), record.get("height", 0)))
            has_objects.append(not all(map(is_crowd, record.get("annotations", ()))))
        index = Index(
            np.array(ends, dtype=np.int64),
            np.array(sizes, dtype=np.float64).reshape(-1, 2),
            np.array(has_objects, dtype=bool),
        )
        # torch.frombuffer refuses to share what is empty.
        return cls(torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8), index)

    def __len__(self) -> int:
        return len(self.index.ends) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        return pickle.loads(self.content.numpy()[self.index.ends[number] : self.index.ends[number + 1]])

    def unpacked(self) -> list[dict[str, Any]]:
        """Return copies of all records."""
        return [self[number] for number in range(len(self))]

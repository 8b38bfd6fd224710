"""In a run of several processes one reads and checks the data sets, and hands them over to the others."""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm

from ..errors import UserError
from .loaded import HandedOver, all_to_hand_over, handed_over
from .packed import PackedRecords

T = TypeVar("T")


def main_process_first(prepare: Callable[[], T]) -> T:
    """Return ``prepare()``, which the main process runs first; in the others it finds the data sets already read.

    All processes of the run must call this.

    Raises:
        UserError: in all processes with the same sentence, that of the first one in which ``prepare`` raises it.
    """
    if comm.get_world_size() == 1:
        return prepare()
    result = sentence = None
    if comm.is_main_process():
        result, sentence = _attempt(prepare)
        _hand_over(sentence, all_to_hand_over())
    else:
        sentence, sets = _receive()
        if sentence is None:
            with handed_over(sets):
                result, sentence = _attempt(prepare)
    for found in comm.all_gather(sentence):
        if found is not None:
            raise UserError(found)
    return result


def _attempt(prepare: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result, or the sentence of the error."""
    try:
        return prepare(), None
    except UserError as error:
        return None, str(error)


def _hand_over(sentence: str | None, sets: dict[str, HandedOver]) -> None:
    indices = {
        name: (None if each.records is None else each.records.index, each.metadata) for name, each in sets.items()
    }
    dist.broadcast_object_list([sentence, indices], group=_cpu_group())
    # The contents go by themselves: pickled they would be copied several times.
    for each in sets.values():
        if each.records is not None:
            dist.broadcast(each.records.content, 0, group=_cpu_group())


def _receive() -> tuple[str | None, dict[str, HandedOver]]:
    message: list[Any] = [None, None]
    dist.broadcast_object_list(message, group=_cpu_group())
    sentence, indices = message
    sets = {}
    for name, (index, metadata) in indices.items():
        records = None
        if index is not None:
            records = PackedRecords(torch.empty(int(index.ends[-1]), dtype=torch.uint8), index)
            dist.broadcast(records.content, 0, group=_cpu_group())
        sets[name] = HandedOver(records, metadata)
    return sentence, sets


@functools.lru_cache()
def _cpu_group() -> dist.ProcessGroup:
    """Return the group for objects in memory: NCCL would send them through the GPUs."""
    return dist.new_group(backend="gloo") if dist.get_backend() == dist.Backend.NCCL else dist.group.WORLD

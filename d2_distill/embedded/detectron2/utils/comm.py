"""Communication between the processes of a run; everything also works in a single process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

_LOCAL_PROCESS_GROUP: dist.ProcessGroup | None = None  # this process and the others of its machine


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Group the processes of each machine; every process must call it, once."""
    global _LOCAL_PROCESS_GROUP
    assert _LOCAL_PROCESS_GROUP is None, "create_local_process_group() was called before."
    world = get_world_size()
    assert world % num_workers_per_machine == 0, f"{world} processes on machines of {num_workers_per_machine}"
    for first in range(0, world, num_workers_per_machine):
        ranks = range(first, first + num_workers_per_machine)
        group = dist.new_group(list(ranks))  # a collective call, of members and others
        if get_rank() in ranks:
            _LOCAL_PROCESS_GROUP = group


def get_local_rank() -> int:
    """Number of this process among those of its machine."""
    if not _is_distributed():
        return 0
    assert _LOCAL_PROCESS_GROUP is not None, "Local ranks are known after create_local_process_group() only."
    return dist.get_rank(group=_LOCAL_PROCESS_GROUP)


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() > 1:
        on_gpus = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)


@functools.lru_cache()
def _gloo_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def _object_group() -> dist.ProcessGroup:
    """The group for pickled objects: NCCL would send them through GPU memory."""
    return _gloo_group() if dist.get_backend() == dist.Backend.NCCL else dist.group.WORLD


def all_gather(data: Any) -> list[Any]:
    """The picklable ``data`` of every process, by rank."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, data, group=_object_group())
    return gathered


def gather(data: Any, dst: int = 0) -> list[Any]:
    """The picklable ``data`` of every process, by rank, on process ``dst``; [] on the others."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=_object_group())
    return gathered or []


def shared_random_seed() -> int:
    """A number below 2**31, the same in all processes: drawn by rank 0 from numpy's global generator."""
    return all_gather(int(np.random.randint(2**31)))[0]

"""``launch``, which runs a function in one process per GPU (or per requested CPU process)."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm


def launch(main_func, num_gpus_per_machine: int, num_machines: int = 1, machine_rank: int = 0, dist_url=None,
           args=()) -> None:
    """Run ``main_func(*args)`` in num_machines * num_gpus_per_machine processes; one is this very process.

    To be called on every machine. With CUDA each process has a GPU and talks through NCCL, else through gloo.

    Args:
        main_func: importable, because spawned processes look it up by name.
        dist_url: address of the first machine's free port, e.g. ``tcp://127.0.0.1:8686``; "auto" finds one
            where there is one machine only.

    Raises:
        ValueError: several processes without an address that all of them can know.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if dist_url is None or (dist_url == "auto" and num_machines > 1):
        raise ValueError(f"dist_url is {dist_url!r}, but {world_size} processes on {num_machines} machines "
                         "need an address such as tcp://<first machine>:<port>.")
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    mp.spawn(
        _run_process,
        args=(main_func, args, world_size, num_gpus_per_machine, machine_rank, dist_url),
        nprocs=num_gpus_per_machine,
    )


def _find_free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _run_process(local_rank, main_func, args, world_size, num_gpus_per_machine, machine_rank, dist_url):
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        assert num_gpus_per_machine <= torch.cuda.device_count(), (
            f"{num_gpus_per_machine} processes were asked for on {torch.cuda.device_count()} GPUs; hide "
            "them with CUDA_VISIBLE_DEVICES= to run on the CPU.")
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=dist_url, world_size=world_size,
        rank=machine_rank * num_gpus_per_machine + local_rank, timeout=timedelta(minutes=30))
    comm.create_local_process_group(num_gpus_per_machine)
    # A process that ran ahead would time out where another is still starting up.
    comm.synchronize()
    main_func(*args)
    dist.destroy_process_group()

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import distributed as dist
from torch import multiprocessing


def test_one_process():
    assert (comm.get_world_size(), comm.get_rank()) == (1, 0)
    assert comm.get_local_rank() == 0
    assert comm.is_main_process() and comm.synchronize() is None
    assert comm.all_gather("x") == comm.gather("x") == ["x"]
    assert 0 <= comm.shared_random_seed() < 2**31


def _one_of_two(rank: int, address: str) -> None:
    import d2_distill  # noqa: F401  (selects the provider in this process)

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    comm.create_local_process_group(1)
    assert (comm.get_world_size(), comm.get_rank()) == (2, rank)
    assert comm.get_local_rank() == 0
    assert comm.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert comm.gather(rank, dst=1) == ([0, 1] if rank == 1 else [])
    np.random.seed(rank)
    seed = comm.shared_random_seed()
    assert comm.all_gather(seed) == [seed, seed]
    comm.synchronize()
    dist.destroy_process_group()
    os._exit(0)  # torch 2.14 now and then aborts a process that ends right after its groups ("terminate called")


def test_two_processes(tmp_path):
    multiprocessing.spawn(_one_of_two, args=(f"file://{tmp_path}/rendezvous",), nprocs=2)


def test_log_files_of_ranks(tmp_path):
    for rank in range(2):
        for _ in range(2):
            logger = setup_logger(str(tmp_path), rank, name=f"test_comm{rank}", abbrev_name="tc")
        assert len(logger.handlers) == 2 - rank
        logging.getLogger(f"test_comm{rank}.part").warning("from %d", rank)
    assert (tmp_path / "log.txt").read_text().endswith("tc.part WARNING: from 0\n")
    assert (tmp_path / "log.txt.rank1").read_text().endswith("part WARNING: from 1\n")


def test_seed_all_rng():
    draws = []
    for _ in range(2):
        seed_all_rng(7)
        draws.append((np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    seed_all_rng(None)
    assert np.random.rand() != pytest.approx(draws[0][0], abs=1e-12)

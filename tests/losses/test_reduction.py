"""The reduction of element-wise losses, and of normalizers over processes."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from d2_distill.losses import mean_over_processes, weighted_mean


def test_matches_a_loop():
    loss, weight = torch.rand(5, 3), torch.rand(5)
    expected = sum(loss[i, k].item() * weight[i].item() for i in range(5) for k in range(3)) / 4.5
    assert weighted_mean(loss, weight[:, None], 4.5).item() == pytest.approx(expected, rel=1e-5)
    assert weighted_mean(loss, None, 4.5).item() == pytest.approx(loss.sum().item() / 4.5, rel=1e-5)


def test_normalizer_may_be_a_tensor_or_zero():
    loss = torch.rand(4)
    assert torch.equal(weighted_mean(loss, None, torch.tensor(3)), weighted_mean(loss, None, 3))
    assert weighted_mean(loss, torch.zeros(4), 0) == 0


def test_no_element_gives_zero_with_a_graph():
    loss = torch.zeros(0, 3, requires_grad=True)
    reduced = weighted_mean(loss, torch.zeros(0, 1), 1)
    reduced.backward()
    assert reduced == 0 and loss.grad.shape == (0, 3)


def _one_of_two(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    value = torch.tensor([1.0, 4.0], requires_grad=True) * (rank + 1)
    averaged = mean_over_processes(value)
    assert averaged.tolist() == [1.5, 6.0] and not averaged.requires_grad
    assert value.tolist() == [rank + 1, 4 * (rank + 1)]
    assert mean_over_processes(torch.tensor(rank)) == 0.5
    positives = mean_over_processes(torch.tensor(float(rank)))
    assert weighted_mean(torch.full((3,), rank), None, positives) == pytest.approx(6 * rank)
    dist.destroy_process_group()


def test_mean_over_two_processes(tmp_path):
    """Forked, not spawned: importing torch twice takes longer than all the other tests."""
    arguments = (f"file://{tmp_path}/rendezvous",)
    multiprocessing.start_processes(_one_of_two, arguments, nprocs=2, start_method="fork")


def test_mean_over_one_process():
    """With or without a process group."""
    value = torch.rand(3, requires_grad=True)
    assert torch.equal(mean_over_processes(value), value) and not mean_over_processes(value).requires_grad
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(mean_over_processes(value), value)
    finally:
        dist.destroy_process_group()

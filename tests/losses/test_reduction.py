"""The reduction of element-wise losses."""

from __future__ import annotations

import pytest
import torch

from d2_distill.losses import weighted_mean


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

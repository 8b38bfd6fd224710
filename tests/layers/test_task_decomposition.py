"""TOOD's layer attention against its definition, cell by cell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.layers.task_decomposition import TaskDecomposition


@pytest.mark.parametrize("norm", ["", lambda channels: nn.GroupNorm(4, channels)])
def test_against_scaled_blocks(norm):
    """The factors are of the blocks, one an image each, and no parameter is without a gradient."""
    torch.manual_seed(0)
    layer = TaskDecomposition(blocks=3, channels=16, norm=norm)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    blocks = [torch.randn(2, 16, 4, 5) for _ in range(3)]
    found = layer(torch.cat(blocks, dim=1))

    hidden, _, last, _ = layer.attention
    for image in range(2):
        means = torch.cat([block[image].mean(dim=(1, 2)) for block in blocks])
        factors = (last.weight[..., 0, 0] @ (hidden.weight[..., 0, 0] @ means + hidden.bias).relu() + last.bias).sigmoid()
        assert factors.shape == (3,) and factors.std() > 0.01
        scaled = torch.cat([factor * block[image] for factor, block in zip(factors, blocks)])
        expected = layer.norm(layer.mixture(scaled[None])).relu()[0]
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-5)

    assert (layer.mixture.bias is None) == bool(norm)
    found.square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_few_channels_have_an_attention():
    assert TaskDecomposition(blocks=2, channels=4)(torch.randn(1, 8, 3, 3)).shape == (1, 4, 3, 3)

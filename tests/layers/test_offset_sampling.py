"""Maps that are read beside their cells, against a loop and a deformable convolution."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import deform_conv2d

from d2_distill.layers.offset_sampling import sample_at_offsets

SIZES = [(5, 7), (1, 1), (1, 6), (4, 1)]


def slow(x: torch.Tensor, y: float, z: float) -> float:
    """A map (H, W) at row y and column z, bilinearly."""
    total, (height, width) = 0.0, x.shape
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(z), math.floor(z) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(z - column)) * x[row, column].item()
    return total


def maps_and_offsets(size, seed: int = 0):
    """Offsets reach over all sides of the maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    return maps, 3 * torch.randn(2, 8, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_against_a_loop(size):
    maps, offsets = maps_and_offsets(size)
    found = sample_at_offsets(maps, offsets)
    assert found.shape == maps.shape
    for image, channel, y, x in torch.cartesian_prod(*map(torch.arange, maps.shape)).tolist():
        dy, dx = offsets[image, 2 * channel : 2 * channel + 2, y, x].tolist()
        expected = slow(maps[image, channel], y + dy, x + dx)
        assert found[image, channel, y, x].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_a_deformable_convolution_reads_the_same(size):
    """With gradients to both."""
    pair = [x.requires_grad_() for x in maps_and_offsets(size, seed=1)]
    ones, weights = torch.ones(4, 1, 1, 1, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    read = [sample_at_offsets(*pair), deform_conv2d(pair[0], pair[1], ones)]
    torch.testing.assert_close(*read)
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), pair) for x in read)):
        torch.testing.assert_close(ours, theirs)


def test_no_offset_reads_the_cell_itself():
    maps = torch.randn(1, 2, 100, 168) * 100
    torch.testing.assert_close(sample_at_offsets(maps, torch.zeros(1, 4, 100, 168)), maps, rtol=0, atol=0.02)

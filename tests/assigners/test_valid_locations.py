"""Which cells count as an image's own, against a loop over cells."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.assigners import valid_locations


@pytest.mark.parametrize("image_size", [(50, 62), (64, 96), (1, 1), (33, 160)])
def test_matches_a_loop(image_size):
    strides = (8, 16, 32, 64, 128)
    grid_sizes = [(math.ceil(96 / stride), math.ceil(160 / stride)) for stride in strides]
    height, width = (math.ceil(size / 32) * 32 for size in image_size)
    expected = [
        i < math.ceil(height / stride) and j < math.ceil(width / stride)
        for (rows, columns), stride in zip(grid_sizes, strides)
        for i in range(rows)
        for j in range(columns)
    ]
    assert valid_locations(image_size, grid_sizes, strides).tolist() == expected


def test_other_divisibility():
    assert valid_locations((20, 8), [(4, 4)], [8], size_divisibility=1).sum() == 3
    assert valid_locations((20, 8), [(4, 4)], [8]).dtype == torch.bool

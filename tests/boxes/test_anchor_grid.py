"""The anchor grid: order, levels, joined maps, and which cells count as an image's own, against loops over cells."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.structures import Boxes

from d2_distill.boxes.anchor_grid import AnchorGrid, valid_cells

STRIDES = (8, 16)
PER_CELL = 3


def _grid(image_sizes=None) -> tuple[AnchorGrid, list[torch.Tensor]]:
    """Two levels of 4 x 6 and 2 x 3 cells, and maps with 3 x 5 channels, all of different values."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, PER_CELL * 5, *size, generator=generator) for size in ((4, 6), (2, 3))]
    anchors = [Boxes(torch.rand(x[0, 0].numel() * PER_CELL, 4, generator=generator)) for x in maps]
    return AnchorGrid.from_levels(anchors, maps, STRIDES, PER_CELL, image_sizes), maps


def test_levels_are_one_after_the_other():
    grid, _ = _grid()
    assert len(grid) == 90 and grid.level_sizes == [72, 18] and grid.map_sizes == ((4, 6), (2, 3))
    assert grid.stride.tolist() == [8.0] * 72 + [16.0] * 18
    assert grid.per_anchor([1, -2]).tolist() == [1.0] * 72 + [-2.0] * 18
    assert torch.equal(Boxes.cat(grid.level_boxes()).tensor, grid.boxes)
    assert torch.equal(grid.centers, Boxes(grid.boxes).get_centers())
    assert [len(x) for x in grid.split(grid.boxes, dim=0)] == [72, 18]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_joined_maps_are_in_the_order_of_the_anchors(memory_format):
    grid, maps = _grid()
    joined = grid.join([x.to(memory_format=memory_format) for x in maps])
    rows = [
        x[:, a * 5 : (a + 1) * 5, i, j]
        for x in maps
        for i in range(x.shape[2])
        for j in range(x.shape[3])
        for a in range(PER_CELL)
    ]
    assert torch.equal(joined, torch.stack(rows, dim=1))


def test_all_anchors_of_a_cell_are_valid_or_none():
    assert _grid()[0].valid is None
    # The padded batch is of 32 x 48 pixels, so that of the second image the columns from 32 pixels on are padding.
    grid, _ = _grid(image_sizes=[(20, 48), (32, 32)])
    inside = [j * stride < 32 for (rows, columns), stride in zip(grid.map_sizes, STRIDES) for _ in range(rows) for j in range(columns)]
    expected = torch.tensor([[True] * len(inside), inside]).repeat_interleave(PER_CELL, dim=1)
    assert torch.equal(grid.valid, expected) and not grid.valid.all()
    assert grid.valid is grid.valid


@pytest.mark.parametrize("image_size", [(50, 62), (64, 96), (1, 1), (33, 160)])
def test_valid_cells_match_a_loop(image_size):
    strides = (8, 16, 32, 64, 128)
    map_sizes = [(math.ceil(96 / stride), math.ceil(160 / stride)) for stride in strides]
    height, width = (math.ceil(size / 32) * 32 for size in image_size)
    expected = [
        i < math.ceil(height / stride) and j < math.ceil(width / stride)
        for (rows, columns), stride in zip(map_sizes, strides)
        for i in range(rows)
        for j in range(columns)
    ]
    assert valid_cells(image_size, map_sizes, strides).tolist() == expected


def test_other_divisibility():
    assert valid_cells((20, 8), [(4, 4)], [8], size_divisibility=1).sum() == 3
    assert valid_cells((20, 8), [(4, 4)], [8]).dtype == torch.bool

"""Reordering of anchor blocks, against the geometry of the anchors themselves."""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from d2_distill.detectors.anchor_order import to_size_outer


def test_ratio_outer_anchors_become_detectron2s():
    sizes, ratios = [8.0, 10.0, 13.0], [0.5, 1.0]
    theirs = [(size / ratio**0.5, size * ratio**0.5) for ratio in ratios for size in sizes]
    generator = DefaultAnchorGenerator(sizes=[sizes], aspect_ratios=[ratios], strides=[8], offset=0.0)
    cell = next(iter(generator.cell_anchors))
    ours = to_size_outer(torch.tensor(theirs), num_sizes=3, num_ratios=2)
    torch.testing.assert_close(ours, cell[:, 2:] - cell[:, :2])


def test_blocks_of_several_channels_move_together_along_any_dimension():
    ours = to_size_outer(torch.arange(12).view(1, 12, 1), num_sizes=3, num_ratios=2, dim=1)
    assert ours.flatten().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    index = to_size_outer(torch.arange(9), num_sizes=3, num_ratios=3)
    assert index.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]

"""ROIPooler, which pools box features from the pyramid level that suits each box."""

from __future__ import annotations

import math

import torch
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import RoIAlign, RoIPool


def assign_boxes_to_levels(
    box_lists: list[Boxes], min_level: int, max_level: int, canonical_box_size: int, canonical_level: int
) -> torch.Tensor:
    """(R,) index of each box's level, counted from ``min_level`` (arXiv:1612.03144, equation 1)."""
    sides = torch.sqrt(Boxes.cat(box_lists).area())
    levels = torch.floor(canonical_level + torch.log2(sides / canonical_box_size + 1e-8))
    return levels.clamp(min=min_level, max=max_level).to(torch.int64) - min_level


def _level_pooler(pooler_type: str, output_size, scale: float, sampling_ratio: int) -> nn.Module:
    if pooler_type == "ROIPool":
        return RoIPool(output_size, scale)
    if pooler_type in ("ROIAlign", "ROIAlignV2"):
        return RoIAlign(output_size, scale, sampling_ratio, aligned=pooler_type == "ROIAlignV2")
    raise ValueError(f"POOLER_TYPE is {pooler_type!r}, not ROIAlign, ROIAlignV2 or ROIPool")


class ROIPooler(nn.Module):
    """Pools every box of a batch to a fixed size.

    Args:
        output_size: side of the result.
        scales: 1 / stride of each level, from fine to coarse, each half of the one before.
        sampling_ratio: of ROIAlign; 0 adapts it to the box.
        pooler_type: ``ROIAlignV2`` (half-pixel correct), ``ROIAlign`` or ``ROIPool``.
        canonical_box_size, canonical_level: a box of this side belongs to this level (log2 of the stride).
    """

    def __init__(self, output_size, scales, sampling_ratio, pooler_type, canonical_box_size=224,
                 canonical_level=4):
        super().__init__()
        self.output_size = output_size
        self.level_poolers = nn.ModuleList(
            _level_pooler(pooler_type, output_size, scale, sampling_ratio) for scale in scales)
        levels = [-math.log2(scale) for scale in scales]
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])
        assert levels == list(range(self.min_level, self.max_level + 1)), f"not a pyramid: {scales}"
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """Pool the R boxes of N images from levels ``x``, each (N, C, H_l, W_l): (R, C, side, side)."""
        boxes = torch.cat([
            torch.cat([boxes.tensor.new_full((len(boxes), 1), image), boxes.tensor], dim=1)
            for image, boxes in enumerate(box_lists)
        ]).to(x[0].dtype)
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level)
        output = x[0].new_zeros((len(boxes), x[0].shape[1], self.output_size, self.output_size))
        for level, (feature, pooler) in enumerate(zip(x, self.level_poolers)):
            index = (levels == level).nonzero(as_tuple=True)[0]
            # also where no box belongs to the level: its parameters then get a zero gradient, as DDP needs
            output.index_put_((index,), pooler(feature, boxes[index]))
        return output

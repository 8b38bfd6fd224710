"""DefaultAnchorGenerator, ANCHOR_GENERATOR_REGISTRY and build_anchor_generator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import nn

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
ANCHOR_GENERATOR_REGISTRY.__doc__ = "Modules built from ``(cfg, input_shape: list of ShapeSpec)``."


def _per_level(values: Sequence, num_levels: int, name: str) -> list[Sequence[float]]:
    """One list of numbers for each level; a flat list, or a list of one list, serves every level."""
    if not isinstance(values[0], Sequence):
        values = [values]
    if len(values) == 1:
        values = list(values) * num_levels
    assert len(values) == num_levels, f"anchor {name}: {len(values)} entries for {num_levels} feature maps"
    return values


def _cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> torch.Tensor:
    """(A, 4) boxes around the origin, sizes outer, ratios (height / width) inner, computed in float64."""
    corners = []
    for size, ratio in itertools.product(sizes, aspect_ratios):
        width = math.sqrt(size**2 / ratio)
        corners.append((width / 2, ratio * width / 2))
    lower_right = torch.tensor(corners, dtype=torch.float64)
    return torch.cat([-lower_right, lower_right], dim=1).float()


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(nn.Module):
    """Anchors of fixed sizes and aspect ratios at every pixel of every feature map (arXiv:1506.01497).

    Args:
        sizes: square roots of the anchors' areas in pixels, a list for each level or one for all.
        aspect_ratios: heights divided by widths, likewise.
        strides: stride of each level.
        offset: position of the first anchor's centre, in [0, 1) of a stride.
    """

    @configurable
    def __init__(self, *, sizes, aspect_ratios, strides, offset=0.5):
        super().__init__()
        assert 0.0 <= offset < 1.0, f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}, not in [0, 1)"
        self.strides = list(strides)
        self.offset = offset
        sizes = _per_level(sizes, len(self.strides), "sizes")
        aspect_ratios = _per_level(aspect_ratios, len(self.strides), "aspect_ratios")
        for i, cell in enumerate(map(_cell_anchors, sizes, aspect_ratios)):
            # not persistent: anchors follow from the config, not from a checkpoint
            self.register_buffer(f"_cell_anchors_{i}", cell, persistent=False)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    @property
    def cell_anchors(self) -> list[torch.Tensor]:
        """Each level's (A, 4) anchors of the pixel at the origin."""
        return [getattr(self, f"_cell_anchors_{i}") for i in range(len(self.strides))]

    @property
    def num_anchors(self) -> list[int]:
        """Anchors per pixel of each level."""
        return [len(cell) for cell in self.cell_anchors]

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """Each level's H * W * A anchors, ordered by row, column, cell anchor."""
        anchors = []
        for feature, stride, cell in zip(features, self.strides, self.cell_anchors):
            y, x = (
                (torch.arange(length, dtype=torch.float32, device=cell.device) + self.offset) * stride
                for length in feature.shape[-2:]
            )
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((shifts + cell).reshape(-1, 4)))
        return anchors


def build_anchor_generator(cfg, input_shape: list[ShapeSpec]) -> nn.Module:
    """The generator named by MODEL.ANCHOR_GENERATOR.NAME, for feature maps of these shapes."""
    return ANCHOR_GENERATOR_REGISTRY.get(cfg.MODEL.ANCHOR_GENERATOR.NAME)(cfg, input_shape)

"""TOOD's head: one tower for both tasks, and predictions that are aligned with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ..layers.joint_logits import joint_logits
from ..layers.offset_sampling import sample_at_offsets
from ..layers.task_decomposition import TaskDecomposition
from ..layers.tower import Tap, Tower
from ..staged import Predictor
from .head import DenseHead, Scale, build_tower

BRANCH = "shared"
# Channels of the tower over hidden channels of the alignment.
REDUCTION = 4


class TaskAlignedHead(DenseHead):
    """T-head (Feng et al., ICCV 2021, arXiv 2108.07755): each task mixes the outputs of all blocks of one tower.

    Class scores are the geometric means of those of the class branch and of one probability a cell; ``logits`` are
    logits of these means. Each side of a box is read from a place beside the cell that the head predicts, too;
    ``deltas`` (N, 4, H, W) are the distances in strides from the cell itself to the left, top, right and bottom that
    were read there, and may be negative. Both are float32, also under autocast.

    Args:
        input_shape: of each level; all have the same channels.
        num_classes: number of foreground classes.
        conv_dims: channels of each tower block, all the same.
        norm: norm of the tower blocks and of the mixtures, see ``detectron2.layers.get_norm``; "" for none.
        prior_prob: class score at initialisation.
    """

    def __init__(
        self, *, input_shape: list[ShapeSpec], num_classes: int, conv_dims: list[int], norm="", prior_prob: float = 0.01
    ) -> None:
        super().__init__()
        channels, blocks = conv_dims[-1], len(conv_dims)
        self.subnet = build_tower(input_shape[0].channels, conv_dims, norm, bias=not norm)
        self.cls_decomposition = TaskDecomposition(blocks, channels, norm)
        self.bbox_decomposition = TaskDecomposition(blocks, channels, norm)
        self.cls_score = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.cls_alignment = _alignment(blocks * channels, channels, 1)
        self.bbox_alignment = _alignment(blocks * channels, channels, 2 * 4)
        self.scales = nn.ModuleList(Scale() for _ in input_shape)
        narrow = set(self.bbox_alignment.modules())
        for part in (self.subnet, self.cls_score, self.bbox_pred, self.cls_alignment, self.bbox_alignment):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.001 if layer in narrow else 0.01)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        for layer in (self.cls_score, self.cls_alignment[-1]):
            nn.init.constant_(layer.bias, -math.log((1 - prior_prob) / prior_prob))

    @property
    def towers(self) -> dict[str, Tower]:
        return {BRANCH: Tower(self.subnet)}

    @property
    def predictors(self) -> dict[str, Predictor]:
        blocks = tuple((BRANCH, Tap(position)) for position in range(1, len(self.towers[BRANCH]) + 1))
        return {"logits": Predictor(blocks, self.cls_score), "deltas": Predictor(blocks, self.bbox_pred)}

    def predict(self, output: str, features: Sequence[torch.Tensor], level: int) -> torch.Tensor:
        x = torch.cat(list(features), dim=1)
        if output == "logits":
            return joint_logits(self.cls_score(self.cls_decomposition(x)), self.cls_alignment(x))
        distances = self.scales[level](self.bbox_pred(self.bbox_decomposition(x)).float().exp())
        return move_sides(distances, self.bbox_alignment(x).float())


def move_sides(distances: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Let each cell take each side of its box from a place beside it.

    The sides are read as coordinates: a box that lies at the same pixels in all cells stays what it is. Outside of
    the map a side lies at 0. A right or bottom side that would lie before its opposite is put there: losses of two
    boxes of negative size have no bound.

    Args:
        distances: (N, 4, H, W) from each cell to the left, top, right and bottom, in cells.
        offsets: (N, 8, H, W), for each side dy and dx of the place that it is read from, in cells.

    Returns:
        (N, 4, H, W) distances from the cells to the sides that were read.
    """
    height, width = distances.shape[-2:]
    ys, xs = (torch.arange(size, dtype=distances.dtype, device=distances.device) for size in (height, width))
    cells = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)])
    before, after = distances.split(2, dim=1)
    sides = sample_at_offsets(torch.cat([cells - before, cells + after], dim=1), offsets)
    before, after = sides.split(2, dim=1)
    return torch.cat([cells - before, before.maximum(after) - cells], dim=1)


def _alignment(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    hidden = max(channels // REDUCTION, 1)
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out_channels, 3, padding=1)
    )

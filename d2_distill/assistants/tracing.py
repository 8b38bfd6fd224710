"""From a RoI back to where a one-stage student proposed it: what the student's tower knows there."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import nn

from ..layers.per_anchor_linear import PerAnchorLinear
from ..layers.tower import Tap
from ..staged import DenseRun, StagedDense, Taps
from .proposals import gather_positions, has_position


class TracedAdapter(nn.Module):
    """The student's tower of the class logits at the positions that proposed the RoIs, through a linear layer.

    Args:
        student: one-stage detector.
        tap: where its tower is read.
        out_dim: channels of what it is compared with.
        per_anchor: one layer for each anchor of a cell, not one for all.
    """

    def __init__(self, student: StagedDense, tap: Tap, out_dim: int, *, per_anchor: bool) -> None:
        super().__init__()
        self.branch, self.tap = student.branch_of("logits"), tap
        channels = student.tap_channels(self.branch, tap.position)
        num_anchors = student.anchors_per_cell if per_anchor else 1
        self.linear = PerAnchorLinear(channels, out_dim, num_anchors)

    def taps(self) -> Taps:
        return {self.branch: frozenset({self.tap})}

    def forward(
        self, student: DenseRun, sampled: list[Instances], target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            sampled: RoIs with ``positions``, R in all.
            target: (R, out_dim), of each RoI.

        Returns:
            the adapted features (R', out_dim) and ``target``, both of the RoIs that are no ground-truth boxes.
        """
        positions = [image.positions for image in sampled]
        kept = has_position(positions)
        x = gather_positions(student.taps[self.branch][self.tap], positions)
        return self.linear(x, torch.cat(positions)[kept, 3]), target[kept]

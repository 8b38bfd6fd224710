"""Layers between the features of detectors of different kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PerAnchorLinear(nn.Linear):
    """A linear layer with weights of its own for each anchor of a cell (TF-HEAD's "decoupled" adapter).

    With ``num_anchors`` 1 it is a plain linear layer for all anchors there are. Else anchor a owns the rows
    ``a * out_dim`` to ``(a + 1) * out_dim - 1`` of ``weight`` (num_anchors * out_dim, in_dim) and of ``bias``.

    Args:
        in_dim, out_dim: channels of a row before and after.
        num_anchors: anchors of a cell.
    """

    def __init__(self, in_dim: int, out_dim: int, num_anchors: int) -> None:
        super().__init__(in_dim, num_anchors * out_dim)
        self.num_anchors = num_anchors

    def forward(self, x: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Rows (R, in_dim) that belong to the given anchors (R,), int64, to (R, out_dim)."""
        if self.num_anchors == 1:
            return super().forward(x)
        chosen = anchors[:, None] == torch.arange(self.num_anchors, device=anchors.device)
        # Each row in the columns of its anchor, zeros in the others: much smaller than the outputs of all
        # anchors for all rows, and the host need not wait for the number of rows of each anchor.
        spread = (chosen[:, :, None] * x[:, None, :]).flatten(start_dim=1)
        weight = self.weight.unflatten(0, (self.num_anchors, -1)).transpose(0, 1).flatten(start_dim=1)
        return F.linear(spread, weight) + self.bias.unflatten(0, (self.num_anchors, -1))[anchors]

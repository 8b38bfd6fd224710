"""torch's and torchvision's layers and functions with the conveniences that detectors lean on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import boxes as box_ops

from .batch_norm import FrozenBatchNorm2d


@dataclass
class ShapeSpec:
    """What a module promises about a feature map; None where it promises nothing."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by an optional norm (a submodule called ``norm``) and an optional activation."""

    def __init__(self, *args, norm: nn.Module | None = None,
                 activation: Callable[[Tensor], Tensor] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class CNNBlockBase(nn.Module):
    """A backbone's block or stem, which states its input channels, output channels and stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> "CNNBlockBase":
        """Stop learning: no gradient for parameters, fixed statistics in batch norms. Returns itself."""
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` that does not copy a list of one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def cross_entropy(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """``F.cross_entropy`` whose mean over nothing is 0 and still part of the graph."""
    if target.numel() == 0 and reduction == "mean":
        return input.sum() * 0.0
    return F.cross_entropy(input, target, reduction=reduction)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression of (N, 4) boxes within each group of equal ``idxs``.

    Returns:
        Indices of the boxes kept, by descending score.
    """
    # Half precision would not keep apart the groups that torchvision shifts away from each other.
    return box_ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)

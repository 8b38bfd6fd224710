"""Deformable convolutions by torchvision's operator: in place of plain ones, and where Detectron2's cannot train."""

from __future__ import annotations

import logging

import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import nn
from torchvision.ops import deform_conv2d

logger = logging.getLogger(__name__)


class DeformableConv2d(nn.Conv2d):
    """Convolution that reads beside its cells, by offsets from a convolution of its own, ``conv_offset``.

    Deformable convolutions v1 (arXiv 1703.06211) and v2 (arXiv 1811.11168) by OpenMMLab's names of tensors: ``weight``
    and ``bias`` are the plain convolution's. Offsets start as zeros, the weights of v2's points as one half.

    Args:
        modulated: version 2, which also weights each point.
        others: as for ``nn.Conv2d``; the padding is zeros.
    """

    def __init__(self, *args, modulated: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modulated = modulated
        self.points = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            self.in_channels, (3 if modulated else 2) * self.points, self.kernel_size, self.stride, self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    @classmethod
    def like(cls, conv: nn.Conv2d, *, modulated: bool) -> DeformableConv2d:
        """Return one with the weight and bias of ``conv``."""
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            groups=conv.groups, bias=conv.bias is not None, modulated=modulated,
        )
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            offset, mask = offset[:, : 2 * self.points], offset[:, 2 * self.points :].sigmoid()
        return _deformed(self, x, offset, mask)


def _deformed(
    conv: nn.Module, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply weight, bias and geometry of a convolution to (N, C, H, W) at places beside its cells."""
    # torchvision's operator takes one type, and on the CPU none of half precision.
    dtype = conv.weight.dtype
    return deform_conv2d(
        x.to(dtype), offset.to(dtype), conv.weight, conv.bias, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, mask=None if mask is None else mask.to(dtype),
    )


class _OnTorchvision:
    """Detectron2's layer through torchvision's operator: the same numbers, on the CPU also with gradients."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = _deformed(self, x, offset, mask)
        for then in (self.norm, self.activation):
            x = x if then is None else then(x)
        return x


class _DeformConv(_OnTorchvision, DeformConv):
    pass


class _ModulatedDeformConv(_OnTorchvision, ModulatedDeformConv):
    pass


def move_to_torchvision(model: nn.Module) -> None:
    """Let the deformable convolutions of a model compute by torchvision's operator, in place.

    Detectron2's own have no gradient on the CPU (v1), or do not run there at all (v2).
    """
    found = [module for module in model.modules() if type(module) in (DeformConv, ModulatedDeformConv)]
    for module in found:
        module.__class__ = _DeformConv if type(module) is DeformConv else _ModulatedDeformConv
    if found:
        logger.info("MODEL.DEVICE is a CPU: deformable convolutions are torchvision's.")

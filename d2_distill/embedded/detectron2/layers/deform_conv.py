"""Deformable convolutions, versions 1 and 2, on torchvision's operator."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d


class _Deformable(nn.Module):
    """What both versions share: arguments as of Conv2d, a weight, and what follows the convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1,
                 groups: int = 1, deformable_groups: int = 1, norm: nn.Module | None = None,
                 activation: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            assert channels % groups == 0, f"{name} {channels} must be a multiple of groups {groups}"
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias: nn.Parameter | None = None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        # The operator has one type for all, and none of half precision on the CPU.
        dtype = self.weight.dtype
        x = deform_conv2d(
            x.to(dtype), offset.to(dtype), self.weight, self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, mask=None if mask is None else mask.to(dtype),
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "deformable_groups")
        return ", ".join([*(f"{name}={getattr(self, name)}" for name in names), f"bias={self.bias is not None}"])


class DeformConv(_Deformable):
    """Convolution whose points are moved (Dai et al., arXiv:1703.06211); without bias.

    Args:
        deformable_groups: groups of input channels with offsets of their own.
        norm, activation: what follows, as in Conv2d.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deformable_groups=1, bias=False, norm=None, activation=None):
        assert not bias, "DeformConv has no bias"
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deformable_groups,
                         norm, activation)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            offset: (N, 2 * deformable_groups * points, H', W') of the output's size; y and x of each point, in cells.
        """
        return self._convolve(x, offset, None)


class ModulatedDeformConv(_Deformable):
    """Convolution whose points are moved and weighted (Zhu et al., arXiv:1811.11168).

    Args:
        deformable_groups: groups of input channels with offsets and weights of their own.
        norm, activation: what follows, as in Conv2d.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deformable_groups=1, bias=True, norm=None, activation=None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deformable_groups,
                         norm, activation)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """
        Args:
            x, offset: see :class:`DeformConv`.
            mask: (N, deformable_groups * points, H', W'), the factor of each point.
        """
        return self._convolve(x, offset, mask)

"""FPN, its top blocks LastLevelMaxPool and LastLevelP6P7, and builders of ResNet-FPN backbones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn

from .backbone import BACKBONE_REGISTRY, Backbone
from .resnet import build_resnet_backbone


class FPN(Backbone):
    """Feature pyramid network (Lin et al., arXiv:1612.03144): outputs ``p<log2 stride>``, all equally wide.

    Args:
        bottom_up: the backbone below.
        in_features: its outputs to use, from fine to coarse, each of twice the stride of the one before.
        out_channels: channels of every output.
        norm: norm of the lateral and output convolutions; with one they have no bias.
        top_block: makes coarser levels: ``top_block(x) -> list``, with attributes ``num_levels`` and
            ``in_feature`` (a feature of ``bottom_up``, else one of the pyramid).
        fuse_type: ``"sum"`` or ``"avg"`` of the lateral and the top-down map.
    """

    def __init__(self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int, norm="",
                 top_block: nn.Module | None = None, fuse_type: str = "sum"):
        super().__init__()
        assert fuse_type in ("sum", "avg"), f"MODEL.FPN.FUSE_TYPE is {fuse_type!r}, not 'sum' or 'avg'"
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        for fine, coarse in zip(strides, strides[1:]):
            assert coarse == 2 * fine, f"strides of MODEL.FPN.IN_FEATURES must double each time: {strides}"

        self.in_features = tuple(in_features)
        self._levels = [int(math.log2(stride)) for stride in strides]
        for level, name in zip(self._levels, in_features):
            lateral = Conv2d(shapes[name].channels, out_channels, kernel_size=1, bias=norm == "",
                             norm=get_norm(norm, out_channels))
            output = Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=norm == "",
                            norm=get_norm(norm, out_channels))
            weight_init.c2_xavier_fill(lateral)
            weight_init.c2_xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        self.top_block = top_block
        self.bottom_up = bottom_up

        self._fuse_type = fuse_type
        self._coarsest_stride = strides[-1]
        extra = 0 if top_block is None else top_block.num_levels
        levels = range(self._levels[0], self._levels[-1] + 1 + extra)
        self._out_feature_channels = {f"p{level}": out_channels for level in levels}
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}

    @property
    def size_divisibility(self) -> int:
        return self._coarsest_stride

    def forward(self, x):
        bottom_up = self.bottom_up(x)
        pyramid, coarser = {}, None
        for level, name in zip(self._levels[::-1], self.in_features[::-1]):
            fused = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if coarser is not None:
                fused = fused + F.interpolate(coarser, scale_factor=2.0, mode="nearest")
                if self._fuse_type == "avg":
                    fused = fused / 2
            coarser = fused
            pyramid[f"p{level}"] = getattr(self, f"fpn_output{level}")(fused)
        if self.top_block is not None:
            coarser = self.top_block({**pyramid, **bottom_up}[self.top_block.in_feature])
            pyramid.update((f"p{level}", x) for level, x in enumerate(coarser, start=self._levels[-1] + 1))
        return {name: pyramid[name] for name in self._out_feature_channels}


class LastLevelMaxPool(nn.Module):
    """P6 as every second pixel of P5."""

    num_levels = 1
    in_feature = "p5"

    def forward(self, x):
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 of RetinaNet (Lin et al., arXiv:1708.02002): 3x3 convolutions of stride 2, a ReLU between."""

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5"):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=2, padding=1)
        weight_init.c2_xavier_fill(self.p6)
        weight_init.c2_xavier_fill(self.p7)

    def forward(self, x):
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))]


def _fpn(cfg, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, norm=fpn.NORM, top_block=top_block,
               fuse_type=fpn.FUSE_TYPE)


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """ResNet and FPN with a max-pooled P6, for two-stage detectors."""
    return _fpn(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """ResNet and FPN with P6 and P7 convolved from ``res5``, for RetinaNet."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))

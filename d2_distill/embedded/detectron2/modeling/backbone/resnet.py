"""ResNet, its stem and blocks, and build_resnet_backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, get_norm
from torch import nn

from .backbone import BACKBONE_REGISTRY, Backbone

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _conv(in_channels, out_channels, kernel_size, norm, *, dilation=1, **kwargs) -> Conv2d:
    """A convolution with its norm, without bias, that keeps the size (up to its stride)."""
    return Conv2d(in_channels, out_channels, kernel_size=kernel_size, padding=dilation * (kernel_size // 2),
                  dilation=dilation, bias=False, norm=get_norm(norm, out_channels), **kwargs)


class BasicStem(CNNBlockBase):
    """The first layers of a ResNet: 7x7 convolution and max-pooling, stride 4 in all."""

    def __init__(self, in_channels=3, out_channels=64, norm="BN"):
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x):
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class _ResidualBlock(CNNBlockBase):
    """``relu(convs(x) + shortcut(x))``; the shortcut is projected where the number of channels changes."""

    def __init__(self, in_channels, out_channels, *, stride, norm):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride)

    def _fill(self, *convs):
        for conv in (*convs, self.shortcut):
            if conv is not None:
                weight_init.c2_msra_fill(conv)

    def forward(self, x):
        out = self._residual(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions, the block of ResNet-18 and -34 (He et al., arXiv:1512.03385, fig. 5 left)."""

    def __init__(self, in_channels, out_channels, *, stride=1, norm="BN"):
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        self._fill(self.conv1, self.conv2)

    def _residual(self, x):
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(_ResidualBlock):
    """1x1, 3x3, 1x1 convolutions, the block of ResNet-50 and deeper (arXiv:1512.03385, fig. 5 right).

    Args:
        bottleneck_channels: output channels of the first two convolutions.
        num_groups: groups of the 3x3 convolution.
        stride_in_1x1: put the stride on the first 1x1 (MSRA's weights) or on the 3x3 (torchvision's).
        dilation: of the 3x3 convolution.
    """

    def __init__(self, in_channels, out_channels, *, bottleneck_channels, stride=1, num_groups=1, norm="BN",
                 stride_in_1x1=False, dilation=1):
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(bottleneck_channels, bottleneck_channels, 3, norm, stride=stride_3x3,
                           dilation=dilation, groups=num_groups)
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
        self._fill(self.conv1, self.conv2, self.conv3)

    def _residual(self, x):
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class DeformBottleneckBlock(_ResidualBlock):
    """BottleneckBlock whose 3x3 convolution is deformable, with offsets from a 3x3 convolution ``conv2_offset``.

    The offsets start as zeros.

    Args:
        deform_modulated: weight the points, too (version 2).
        deform_num_groups: groups of channels with offsets of their own.
        others: see BottleneckBlock.
    """

    def __init__(self, in_channels, out_channels, *, bottleneck_channels, stride=1, num_groups=1, norm="BN",
                 stride_in_1x1=False, dilation=1, deform_modulated=False, deform_num_groups=1):
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        self.deform_modulated = deform_modulated
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        values = 3 if deform_modulated else 2  # of each of the 9 points
        place = {"kernel_size": 3, "stride": stride_3x3, "padding": dilation, "dilation": dilation}
        self.conv2_offset = Conv2d(bottleneck_channels, values * 9 * deform_num_groups, **place)
        self.conv2 = (ModulatedDeformConv if deform_modulated else DeformConv)(
            bottleneck_channels, bottleneck_channels, **place, bias=False, groups=num_groups,
            deformable_groups=deform_num_groups, norm=get_norm(norm, bottleneck_channels))
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
        self._fill(self.conv1, self.conv2, self.conv3)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def _residual(self, x):
        x = F.relu_(self.conv1(x))
        offset = self.conv2_offset(x)
        if self.deform_modulated:
            # The last third are the points' factors, the others their y and x.
            places = offset.shape[1] // 3 * 2
            x = self.conv2(x, offset[:, :places], torch.sigmoid(offset[:, places:]))
        else:
            x = self.conv2(x, offset)
        return self.conv3(F.relu_(x))


class ResNet(Backbone):
    """A stem and stages of blocks, named ``stem``, ``res2``, ``res3``, ... (arXiv:1512.03385).

    Args:
        stem: the first layers.
        stages: lists of blocks (``make_stage``); stages beyond the last wanted output are dropped.
        out_features: names of the outputs.
        freeze_at: see :meth:`freeze`.
    """

    def __init__(self, stem: CNNBlockBase, stages: Sequence[Sequence[CNNBlockBase]], *,
                 out_features: Sequence[str], freeze_at: int = 0):
        super().__init__()
        layers = {"stem": [stem], **{f"res{i}": blocks for i, blocks in enumerate(stages, start=2)}}
        for name in out_features:
            assert name in layers, f"MODEL.RESNETS.OUT_FEATURES has {name!r}; available: {', '.join(layers)}"
        self._out_features = list(out_features)
        self._layers = list(layers)[: 1 + max(list(layers).index(name) for name in out_features)]

        channels, strides, stride = {}, {}, 1
        for name in self._layers:
            self.add_module(name, stem if name == "stem" else nn.Sequential(*layers[name]))
            stride *= math.prod(block.stride for block in layers[name])
            channels[name], strides[name] = layers[name][-1].out_channels, stride
        self._out_feature_channels = {name: channels[name] for name in self._out_features}
        self._out_feature_strides = {name: strides[name] for name in self._out_features}
        self.freeze(freeze_at)

    def forward(self, x):
        assert x.dim() == 4, f"ResNet takes an (N, C, H, W) batch, not {tuple(x.shape)}"
        outputs = {}
        for name in self._layers:
            outputs[name] = x = getattr(self, name)(x)
        return {name: outputs[name] for name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> "ResNet":
        """Freeze the first layers: from 1 on the stem, from 2 on ``res2`` too, and so on."""
        for name in self._layers[: max(freeze_at, 0)]:
            for block in [self.stem] if name == "stem" else getattr(self, name):
                block.freeze()
        return self

    @staticmethod
    def make_stage(block_class: type[CNNBlockBase], num_blocks: int, *, in_channels: int, out_channels: int,
                   stride_per_block: Sequence[int], **kwargs) -> list[CNNBlockBase]:
        """Blocks of one resolution; ``kwargs`` go to every block."""
        assert len(stride_per_block) == num_blocks, f"{num_blocks} blocks have strides {stride_per_block}"
        return [
            block_class(in_channels if i == 0 else out_channels, out_channels, stride=stride, **kwargs)
            for i, stride in enumerate(stride_per_block)
        ]


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg, input_shape) -> ResNet:
    """The ResNet described by MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT."""
    resnets = cfg.MODEL.RESNETS
    assert resnets.DEPTH in _BLOCKS_PER_STAGE, f"MODEL.RESNETS.DEPTH must be in {list(_BLOCKS_PER_STAGE)}"
    assert resnets.RES5_DILATION in (1, 2), "MODEL.RESNETS.RES5_DILATION must be 1 or 2"
    basic = resnets.DEPTH < 50
    if basic:
        for key, value in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            assert resnets[key] == value, f"MODEL.RESNETS.{key} must be {value} for ResNet-18 and -34"
        assert not any(resnets.DEFORM_ON_PER_STAGE), (
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be False four times for ResNet-18 and -34")

    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    stages = []
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    bottleneck_channels = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[resnets.DEPTH], start=2):
        if all(f"res{k}" not in resnets.OUT_FEATURES for k in range(i, 6)):
            break
        dilation = resnets.RES5_DILATION if i == 5 else 1
        first_stride = 1 if i == 2 or dilation == 2 else 2
        bottleneck = {} if basic else {
            "bottleneck_channels": bottleneck_channels, "num_groups": resnets.NUM_GROUPS,
            "stride_in_1x1": resnets.STRIDE_IN_1X1, "dilation": dilation,
        }
        block_class = BasicBlock if basic else BottleneckBlock
        if resnets.DEFORM_ON_PER_STAGE[i - 2]:
            block_class = DeformBottleneckBlock
            bottleneck.update(deform_modulated=resnets.DEFORM_MODULATED, deform_num_groups=resnets.DEFORM_NUM_GROUPS)
        stages.append(ResNet.make_stage(
            block_class, num_blocks, in_channels=in_channels,
            out_channels=out_channels, stride_per_block=[first_stride] + [1] * (num_blocks - 1),
            norm=resnets.NORM, **bottleneck))
        in_channels, out_channels = out_channels, 2 * out_channels
        bottleneck_channels *= 2
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)

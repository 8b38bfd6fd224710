"""Slimmable ResNet and MobileNetV2 (arXiv 1812.08928) at one of their widths.

A slimmable network is trained at several widths at once, which share their convolutions but not their batch
norms. At one width, fixed when the detector is built, it is an ordinary network: Detectron2's ResNet or
torchvision's MobileNetV2 with fewer channels. So only that width's parameters exist, and all of them are trained;
``slimmable_weights.py`` cuts them out of published files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from ..config.keys import extend_config
from ..errors import UserError
from .mobilenet_v2 import MobileNetV2
from .pyramid import build_pyramid, pyramid_features
from .torchvision_trunk import require_three_channels

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NORMS = ("BN", "SyncBN", "FrozenBN")


@extend_config
def add_config(cfg: CfgNode) -> None:
    # Networks whose weights hold several widths, of which one is built (MSAD).
    node = cfg.MODEL.SLIMMABLE = CfgNode()
    # "BN", "SyncBN" or "FrozenBN".
    node.NORM = "BN"
    # Of the ResNet: 50, 101 or 152.
    node.DEPTH = 50
    # The width to build, one of WIDTH_MULT_LIST.
    node.WIDTH_MULT = 1.0
    # The widths in the order in which public weights were trained; MobileNetV2's are 0.35, 0.5, 0.75, 1.0.
    node.WIDTH_MULT_LIST = [0.25, 0.5, 0.75, 1.0]


class Slimmable(nn.Module):
    """A network that published slimmable weights fit.

    Attributes:
        width_index: which of the widths of those files it has; they number their batch norms by it.
    """

    width_index: int

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of what the files call ``features.0``, ``features.1``, ..."""
        raise NotImplementedError


class SlimmableResNet(Slimmable, ResNet):
    """ResNet-50, -101 or -152 with the stride on the 3x3 convolutions; features res2 to res5.

    Args:
        depth: key of ``BLOCKS_PER_STAGE``.
        width_mult: factor on the channels, rounded down.
        width_index: see :class:`Slimmable`.
        norm, out_features, freeze_at: as of Detectron2's ResNet.

    Raises:
        UserError: there is no such depth.
    """

    def __init__(
        self,
        *,
        depth: int,
        width_mult: float,
        width_index: int,
        norm: str,
        out_features: Sequence[str],
        freeze_at: int,
    ) -> None:
        if depth not in BLOCKS_PER_STAGE:
            known = ", ".join(map(str, BLOCKS_PER_STAGE))
            raise UserError(f"MODEL.SLIMMABLE.DEPTH is {depth}; choose one of {known}.")
        stem = BasicStem(in_channels=3, out_channels=int(64 * width_mult), norm=norm)
        stages, in_channels = [], stem.out_channels
        for index, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
            out_channels = int(64 * 2**index * width_mult * 4)
            stages.append(
                ResNet.make_stage(
                    BottleneckBlock,
                    num_blocks,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    bottleneck_channels=out_channels // 4,
                    stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
                    norm=norm,
                )
            )
            in_channels = out_channels
        super().__init__(stem, stages, out_features=out_features, freeze_at=freeze_at)
        self.width_index = width_index

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        yield "stem", self.stem
        for stage in ("res2", "res3", "res4", "res5"):
            for name, block in getattr(self, stage).named_children():
                yield f"{stage}.{name}", block


class SlimmableMobileNetV2(Slimmable, MobileNetV2):
    """MobileNetV2 whose res5 are the 1280 channels, at any width, of its last 1x1 convolution.

    Args:
        width_mult, norm, out_features, freeze_at: see MobileNetV2.
        width_index: see :class:`Slimmable`.
        widths: all widths of the slimmable network, which share its residual connections.
    """

    def __init__(self, *, width_index: int, widths: Sequence[float], **options: Any) -> None:
        super().__init__(activation="ReLU6", same_padding=False, out_stages=(1, 2, 4, 7), **options)
        self.width_index = width_index
        _keep_shared_residuals(self.features, widths)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, layer in self.features.named_children():
            yield f"features.{name}", layer


def _keep_shared_residuals(layers: nn.Sequential, widths: Sequence[float]) -> None:
    """Drop the residual connections of blocks that change the number of channels at any of the widths.

    Rounding to multiples of 8 can make the channels before and after a block equal at one width only: 32 and 16
    are both 8 at width 0.25.
    """
    with torch.device("meta"):
        networks = [torchvision.models.MobileNetV2(width_mult=width).features for width in widths]
    for layer, *of_all_widths in zip(layers, *networks):
        if isinstance(layer, InvertedResidual):
            layer.use_res_connect = all(block.use_res_connect for block in of_all_widths)


@BACKBONE_REGISTRY.register()
def build_slimmable_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """:class:`SlimmableResNet` of ``MODEL.SLIMMABLE`` with :func:`~d2_distill.backbones.build_pyramid` on it.

    Raises:
        UserError: a key of ``MODEL.SLIMMABLE`` or ``MODEL.FPN`` does not fit.
    """
    options = _options(cfg, input_shape)
    return build_pyramid(cfg, SlimmableResNet(depth=cfg.MODEL.SLIMMABLE.DEPTH, **options))


@BACKBONE_REGISTRY.register()
def build_slimmable_mobilenet_v2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """:class:`SlimmableMobileNetV2` of ``MODEL.SLIMMABLE`` with a pyramid on it, as above.

    Raises:
        UserError: a key of ``MODEL.SLIMMABLE`` or ``MODEL.FPN`` does not fit.
    """
    options = _options(cfg, input_shape)
    return build_pyramid(cfg, SlimmableMobileNetV2(widths=cfg.MODEL.SLIMMABLE.WIDTH_MULT_LIST, **options))


def _options(cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    """What both networks read from the config."""
    require_three_channels(input_shape)
    node = cfg.MODEL.SLIMMABLE
    widths = list(node.WIDTH_MULT_LIST)
    if node.WIDTH_MULT not in widths:
        raise UserError(
            f"MODEL.SLIMMABLE.WIDTH_MULT is {node.WIDTH_MULT}, which MODEL.SLIMMABLE.WIDTH_MULT_LIST "
            f"{widths} does not have; choose one of these, or list the widths of the weights in their order."
        )
    if node.NORM not in NORMS:
        raise UserError(f"MODEL.SLIMMABLE.NORM is {node.NORM!r}; choose one of {', '.join(NORMS)}.")
    return {
        "width_mult": node.WIDTH_MULT,
        "width_index": widths.index(node.WIDTH_MULT),
        "norm": node.NORM,
        "out_features": pyramid_features(cfg),
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
    }

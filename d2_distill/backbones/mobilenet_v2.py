"""MobileNetV2, of torchvision's modules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError
from .pyramid import build_pyramid, pyramid_features
from .torchvision_trunk import TorchvisionTrunk, require_three_channels

# Of each stage (output channels of width 1.0: 16, 24, 32, 64, 96, 160, 320, 1280): number of layers up to its end,
# and stride. The last one is a 1x1 convolution.
LAYERS = (2, 4, 7, 11, 14, 17, 18, 19)
STRIDES = (2, 4, 8, 16, 16, 32, 32, 32)

ACTIVATIONS = {"ReLU6": nn.ReLU6, "LeakyReLU": partial(nn.LeakyReLU, 0.1)}


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.MOBILENETV2 = CfgNode()
    # Factor on the channels.
    node.WIDTH_MULT = 1.0
    # "BN", "SyncBN" or "FrozenBN".
    node.NORM = "BN"
    # "ReLU6", with which torchvision's weights were trained, or "LeakyReLU" of slope 0.1 (HEAD).
    node.ACTIVATION = "ReLU6"
    # The stages, 0 to 7, whose outputs are res2, res3, res4 and res5; 7 is the 1x1 convolution to 1280 channels after
    # stage 6, which has 320.
    node.OUT_STAGES = (1, 2, 4, 7)
    # Pad convolutions of stride 2 at the bottom and the right only, for weights that were trained with TensorFlow.
    node.SAME_PADDING = False


class SamePadConv2d(nn.Conv2d):
    """3x3 convolution of stride 2 that pads as TensorFlow's "SAME": even sizes at the bottom and the right only."""

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "SamePadConv2d":
        """With the weight of ``conv``."""
        same = cls(conv.in_channels, conv.out_channels, 3, stride=2, groups=conv.groups, bias=False)
        same.weight = conv.weight
        return same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


class MobileNetV2(TorchvisionTrunk):
    """torchvision's MobileNetV2 (arXiv 1801.04381) up to its pooling; features res2 to res5.

    Args:
        width_mult: factor on the channels.
        norm: "BN", "SyncBN" or "FrozenBN".
        activation: key of ``ACTIVATIONS``; torchvision's weights were trained with "ReLU6".
        same_padding: see :class:`SamePadConv2d`; for weights that come from TensorFlow. torchvision pads all sides.
        out_stages: which of the eight stages res2, res3, res4 and res5 are the outputs of.
        out_features, freeze_at: see TorchvisionTrunk; the stem is the first two layers, of stride 2.

    Raises:
        UserError: a key of MODEL.MOBILENETV2 has a value other than these.
    """

    def __init__(
        self,
        *,
        width_mult: float,
        norm: str,
        activation: str,
        same_padding: bool,
        out_stages: Sequence[int],
        out_features: Sequence[str],
        freeze_at: int,
    ) -> None:
        for key, value, known in (
            ("NORM", norm, ("BN", "SyncBN", "FrozenBN")),
            ("ACTIVATION", activation, ACTIVATIONS),
        ):
            if value not in known:
                raise UserError(f"MODEL.MOBILENETV2.{key} is {value!r}; choose one of {', '.join(known)}.")
        strides = [STRIDES[stage] for stage in out_stages if 0 <= stage < len(STRIDES)]
        if strides != [4, 8, 16, 32] or len(out_stages) != 4:
            raise UserError(
                f"MODEL.MOBILENETV2.OUT_STAGES is {tuple(out_stages)}; choose four of the stages 0 to 7, whose "
                f"strides are {STRIDES}, of the strides 4, 8, 16 and 32."
            )
        layers = torchvision.models.MobileNetV2(width_mult=width_mult, norm_layer=partial(get_norm, norm)).features
        names = [f"res{level}" for level in range(2, 6)]
        ends = {name: LAYERS[stage] for name, stage in zip(names, out_stages)}
        super().__init__(
            layers,
            stages={"stem": LAYERS[0], **ends},
            channels={name: layers[end - 1].out_channels for name, end in ends.items()},
            out_features=out_features,
        )
        if activation != "ReLU6":
            _replace(self, lambda m: isinstance(m, nn.ReLU6), lambda m: ACTIVATIONS[activation](inplace=True))
        if same_padding:
            _replace(self, lambda m: isinstance(m, nn.Conv2d) and m.stride == (2, 2), SamePadConv2d.like)
        self.freeze(freeze_at)


def _replace(
    module: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> None:
    for name, child in module.named_children():
        if wanted(child):
            setattr(module, name, make(child))
        else:
            _replace(child, wanted, make)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 of ``MODEL.MOBILENETV2`` with :func:`~d2_distill.backbones.build_pyramid` on it."""
    require_three_channels(input_shape)
    node = cfg.MODEL.MOBILENETV2
    bottom_up = MobileNetV2(
        width_mult=node.WIDTH_MULT,
        norm=node.NORM,
        activation=node.ACTIVATION,
        same_padding=node.SAME_PADDING,
        out_stages=node.OUT_STAGES,
        out_features=pyramid_features(cfg),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return build_pyramid(cfg, bottom_up)

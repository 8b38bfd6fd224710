"""Backbones beside Detectron2's own; importing this package registers them."""

from __future__ import annotations

from .fixed_batch_norm import FixedBatchNorm2d, fix_statistics
from .mobilenet_v2 import MobileNetV2, build_mobilenet_v2_fpn_backbone
from .narrow_resnet import build_narrow_resnet_fpn_backbone
from .pyramid import LinearP6P7, build_pyramid
from .resnet_fpn import build_p3p7_resnet_fpn_backbone
from .swin import Detectron2Swin, SwinTransformer, build_swin_fpn_backbone

__all__ = [
    "Detectron2Swin",
    "FixedBatchNorm2d",
    "LinearP6P7",
    "MobileNetV2",
    "SwinTransformer",
    "build_mobilenet_v2_fpn_backbone",
    "build_narrow_resnet_fpn_backbone",
    "build_p3p7_resnet_fpn_backbone",
    "build_pyramid",
    "build_swin_fpn_backbone",
    "fix_statistics",
]

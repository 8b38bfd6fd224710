"""Backbones beside Detectron2's own; importing this package registers them."""

from __future__ import annotations

from .low_resolution import LowResolution, build_low_resolution_backbone
from .mobilenet_v2 import MobileNetV2, build_mobilenet_v2_fpn_backbone
from .narrow_resnet import build_narrow_resnet_fpn_backbone
from .pyramid import LinearP6P7, build_pyramid
from .resnet_fpn import build_p3p7_resnet_fpn_backbone
from .slimmable import build_slimmable_mobilenet_v2_fpn_backbone, build_slimmable_resnet_fpn_backbone
from .swin import Detectron2Swin, SwinTransformer, build_swin_fpn_backbone
from .timm_trunk import TimmTrunk, build_timm_fpn_backbone

__all__ = [
    "Detectron2Swin",
    "LinearP6P7",
    "LowResolution",
    "MobileNetV2",
    "SwinTransformer",
    "TimmTrunk",
    "build_low_resolution_backbone",
    "build_mobilenet_v2_fpn_backbone",
    "build_narrow_resnet_fpn_backbone",
    "build_p3p7_resnet_fpn_backbone",
    "build_pyramid",
    "build_slimmable_mobilenet_v2_fpn_backbone",
    "build_slimmable_resnet_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_timm_fpn_backbone",
]

"""Backbones beside Detectron2's own; importing this package registers them."""

from __future__ import annotations

from .narrow_resnet import build_narrow_resnet_fpn_backbone

__all__ = ["build_narrow_resnet_fpn_backbone"]

"""Distillation methods, one file each; importing this package registers them."""

from __future__ import annotations

from .base import DISTILL_METHOD_REGISTRY, DistillMethod, build_methods, list_methods, refusals
from .cross_head import CrossKD
from .cross_roi import CrossKDRoI
from .feature_imitation import FeatureImitation
from .hetero_assist import HEAD
from .localization import LD
from .multi_scale_aligned import MSAD
from .pearson import PKD
from .teacher_free import TFHEAD

__all__ = [
    "DISTILL_METHOD_REGISTRY",
    "DistillMethod",
    "build_methods",
    "list_methods",
    "refusals",
    "CrossKD",
    "CrossKDRoI",
    "FeatureImitation",
    "HEAD",
    "LD",
    "MSAD",
    "PKD",
    "TFHEAD",
]

"""Distillation methods, one file each; importing this package registers them."""

from __future__ import annotations

from .base import DISTILL_METHOD_REGISTRY, DistillMethod, build_methods, list_methods
from .cross_head import CrossKD
from .cross_roi import CrossKDRoI
from .feature_imitation import FeatureImitation
from .localization import LD
from .pearson import PKD

__all__ = [
    "DISTILL_METHOD_REGISTRY",
    "DistillMethod",
    "build_methods",
    "list_methods",
    "CrossKD",
    "CrossKDRoI",
    "FeatureImitation",
    "LD",
    "PKD",
]

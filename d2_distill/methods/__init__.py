"""Distillation methods, one file each; importing this package registers them."""

from __future__ import annotations

from .base import DISTILL_METHOD_REGISTRY, DistillMethod, build_methods, list_methods
from .cross_head import CrossKD
from .feature_imitation import FeatureImitation
from .pearson import PKD

__all__ = [
    "DISTILL_METHOD_REGISTRY",
    "DistillMethod",
    "build_methods",
    "list_methods",
    "CrossKD",
    "FeatureImitation",
    "PKD",
]

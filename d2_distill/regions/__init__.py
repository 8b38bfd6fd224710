"""Regions: which locations or anchors a distillation term looks at; functions of tensors only."""

from __future__ import annotations

from .finegrained import finegrained_region
from .focal import feature_energy, focal_masks, spatial_attention
from .general_instance import general_instance_rows
from .inside_boxes import inside_boxes
from .valuable import VALUABLE_OVERLAPS, valuable_region

__all__ = [
    "VALUABLE_OVERLAPS",
    "feature_energy",
    "finegrained_region",
    "focal_masks",
    "general_instance_rows",
    "inside_boxes",
    "spatial_attention",
    "valuable_region",
]

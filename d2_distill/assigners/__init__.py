"""Target assignment: which anchor answers for which ground-truth box; functions of tensors only."""

from __future__ import annotations

from .assignment import Assignment
from .atss import ATSSMatch, atss_thresholds, match_atss
from .ground_truth import BACKGROUND, IGNORED, GroundTruth
from .max_iou import match_max_iou
from .points import match_points
from .strategies import ATSSAssigner, MaxIoUAssigner, PointAssigner
from .valid_locations import valid_locations

__all__ = [
    "ATSSAssigner",
    "ATSSMatch",
    "Assignment",
    "BACKGROUND",
    "GroundTruth",
    "IGNORED",
    "MaxIoUAssigner",
    "PointAssigner",
    "atss_thresholds",
    "match_atss",
    "match_max_iou",
    "match_points",
    "valid_locations",
]

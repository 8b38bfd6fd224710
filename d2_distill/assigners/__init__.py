"""Target assignment: which anchor answers for which ground-truth box; functions of tensors only."""

from __future__ import annotations

from .assignment import BACKGROUND, IGNORED, Assignment, Match
from .atss import ATSSMatch, atss_thresholds, match_atss
from .ground_truth import GroundTruth
from .max_iou import match_max_iou
from .points import match_points
from .strategies import Assigner, ATSSAssigner, MaxIoUAssigner, PointAssigner, Predicted, TaskAlignedAssigner
from .task_aligned import TaskAlignedMatch, match_task_aligned

__all__ = [
    "ATSSAssigner",
    "ATSSMatch",
    "Assigner",
    "Assignment",
    "BACKGROUND",
    "GroundTruth",
    "IGNORED",
    "Match",
    "MaxIoUAssigner",
    "PointAssigner",
    "Predicted",
    "TaskAlignedAssigner",
    "TaskAlignedMatch",
    "atss_thresholds",
    "match_atss",
    "match_max_iou",
    "match_points",
    "match_task_aligned",
]

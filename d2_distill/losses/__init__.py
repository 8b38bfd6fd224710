"""Distillation losses: pure functions on tensors, one small file each.

Element-wise losses are returned unreduced; :func:`weighted_mean` reduces them in the published convention.
"""

from __future__ import annotations

from .align import align_statistics
from .iou import giou_loss, log_iou_loss
from .kd_kl_div import kd_kl_div_loss
from .kd_quality_focal import kd_quality_focal_loss
from .pearson import pearson_loss
from .reduction import weighted_mean

__all__ = [
    "align_statistics",
    "giou_loss",
    "kd_kl_div_loss",
    "kd_quality_focal_loss",
    "log_iou_loss",
    "pearson_loss",
    "weighted_mean",
]

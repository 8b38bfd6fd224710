"""Losses and their targets: pure functions on tensors, one small file each.

Element-wise losses are returned unreduced; :func:`weighted_mean` reduces them in the published convention.
"""

from __future__ import annotations

from .align import align_statistics
from .centerness import centerness_targets
from .distribution_focal import distribution_focal_loss
from .focal import focal_loss_sum
from .iou import BOX_LOSSES, ciou_loss, diou_loss, giou_loss, linear_iou_loss, log_iou_loss
from .kd_kl_div import kd_kl_div_loss
from .pearson import pearson_loss
from .quality_focal import quality_focal_loss
from .reduction import mean_over_processes, weighted_mean

__all__ = [
    "BOX_LOSSES",
    "align_statistics",
    "centerness_targets",
    "ciou_loss",
    "diou_loss",
    "distribution_focal_loss",
    "focal_loss_sum",
    "giou_loss",
    "kd_kl_div_loss",
    "linear_iou_loss",
    "log_iou_loss",
    "mean_over_processes",
    "pearson_loss",
    "quality_focal_loss",
    "weighted_mean",
]

"""What detectors with a focal class loss share, and those of them that predict centerness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss_jit

from ..assigners import Assignment
from ..losses import centerness_targets, mean_over_processes, weighted_mean
from .tower_detector import TowerDetector, concatenate_levels


class FocalDetector(TowerDetector):
    """
    Args:
        focal_loss_alpha, focal_loss_gamma: of the class loss (arXiv 1708.02002).
        kwargs: of :class:`TowerDetector`.
    """

    def __init__(self, *, focal_loss_alpha: float, focal_loss_gamma: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma

    def class_loss(self, logits: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """Sum of the focal loss over logits (N, R, num_classes) of the anchors that are not ignored."""
        valid = assignment.valid
        targets = F.one_hot(assignment.labels[valid], self.num_classes + 1)[:, :-1].to(logits.dtype)
        return sigmoid_focal_loss_jit(
            logits[valid], targets, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma, reduction="sum"
        )


class CenternessDetector(FocalDetector):
    """Base of ATSS and OpenMMLabFCOS: the centerness target also weighs the box loss.

    Losses are ``loss_cls`` and ``loss_centerness``, divided by the number of positives, and ``loss_box_reg``,
    the weighted mean over the positives.

    Args:
        normalizer_floor: lower bound of the sum of centerness targets that the box loss is divided by.
        kwargs: of :class:`FocalDetector`.
    """

    def __init__(self, *, normalizer_floor: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.normalizer_floor = normalizer_floor

    def num_positives(self, assignment: Assignment) -> torch.Tensor:
        """Of the batch, on this process."""
        raise NotImplementedError

    def losses(self, anchors, outputs, assignment) -> dict[str, torch.Tensor]:
        whole = concatenate_levels(outputs)
        positives = self.positives(anchors, whole["deltas"], assignment)
        with torch.no_grad():
            centerness = centerness_targets(positives.distances)
            num_positives = mean_over_processes(self.num_positives(assignment)).clamp(min=1)
            normalizer = mean_over_processes(centerness.sum()).clamp(min=self.normalizer_floor)

        box_loss = self.box_loss(positives.boxes, positives.targets)
        logits = whole["centerness"].squeeze(-1)[positives.rows]
        centerness_loss = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
        return {
            "loss_cls": self.class_loss(whole["logits"], assignment) / num_positives,
            "loss_box_reg": weighted_mean(box_loss, centerness, normalizer) * self.box_loss_weight,
            "loss_centerness": weighted_mean(centerness_loss, None, num_positives),
        }

"""What the project's dense detectors minimize: one criterion for each published combination of losses.

A criterion takes the detector, its :class:`~d2_distill.boxes.anchor_grid.AnchorGrid`, the outputs (N, R, K) and the
:class:`~d2_distill.assigners.Assignment` of a batch, and returns scalar losses by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import torch
import torch.nn.functional as F

from ..assigners import Assignment
from ..boxes.anchor_grid import AnchorGrid
from ..boxes.geometry import distances_to_sides
from ..losses import (
    centerness_targets,
    distribution_focal_loss,
    focal_loss_sum,
    linear_iou_loss,
    mean_over_processes,
    quality_focal_loss,
    weighted_mean,
)

if TYPE_CHECKING:
    from .tower_detector import TowerDetector

Outputs = Mapping[str, torch.Tensor]
Losses = dict[str, torch.Tensor]
# Element-wise loss of paired XYXY boxes.
BoxLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FocalBoxes:
    """RetinaNet in OpenMMLab's convention: both losses are divided by the positives of the batch.

    ``loss_cls`` is the focal loss (arXiv 1708.02002) of all anchors that are not ignored, ``loss_box_reg`` the box
    loss of the positives.

    Attributes:
        focal_loss_alpha, focal_loss_gamma: of the class loss.
        box_loss: None for the L1 loss of deltas.
        box_loss_weight: factor on the box loss.
    """

    focal_loss_alpha: float
    focal_loss_gamma: float
    box_loss: BoxLoss | None
    box_loss_weight: float

    def __call__(
        self, detector: TowerDetector, grid: AnchorGrid, outputs: Outputs, assignment: Assignment
    ) -> Losses:
        positives = detector.positives(grid, outputs["deltas"], assignment)
        if self.box_loss is None:
            targets = detector.box_coder.encode(positives.targets, positives.anchors)
            box_loss = (positives.deltas - targets).abs().sum(dim=-1)
        else:
            box_loss = self.box_loss(positives.boxes, positives.targets)
        normalizer = detector.normalizer(grid, assignment)
        class_loss = focal_class_loss(
            outputs["logits"], assignment, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return {
            "loss_cls": class_loss / normalizer,
            "loss_box_reg": weighted_mean(box_loss, None, normalizer) * self.box_loss_weight,
        }


@dataclass(frozen=True)
class FocalCenterness:
    """ATSS and FCOS: the centerness target also weights the box loss.

    ``loss_cls`` (focal loss, arXiv 1708.02002) and ``loss_centerness`` are divided by the number of positives, averaged
    over the processes; ``loss_box_reg`` is the weighted mean over the positives. A detector that predicts no centerness
    has no ``loss_centerness``.

    Attributes:
        focal_loss_alpha, focal_loss_gamma: of the class loss.
        box_loss, box_loss_weight: the box loss and its factor.
        normalizer_floor: lower bound of the sum of centerness targets that the box loss is divided by.
        counts_empty_images: whether an image without any positive counts as one.
    """

    focal_loss_alpha: float
    focal_loss_gamma: float
    box_loss: BoxLoss
    box_loss_weight: float
    normalizer_floor: float
    counts_empty_images: bool

    def __call__(
        self, detector: TowerDetector, grid: AnchorGrid, outputs: Outputs, assignment: Assignment
    ) -> Losses:
        positives = detector.positives(grid, outputs["deltas"], assignment)
        with torch.no_grad():
            centerness = centerness_targets(positives.distances)
            count = assignment.normalizer if self.counts_empty_images else assignment.foreground.sum()
            num_positives = mean_over_processes(count).clamp(min=1)
            normalizer = mean_over_processes(centerness.sum()).clamp(min=self.normalizer_floor)

        class_loss = focal_class_loss(
            outputs["logits"], assignment, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        box_loss = self.box_loss(positives.boxes, positives.targets)
        losses = {
            "loss_cls": class_loss / num_positives,
            "loss_box_reg": weighted_mean(box_loss, centerness, normalizer) * self.box_loss_weight,
        }
        if "centerness" in outputs:
            logits = outputs["centerness"].squeeze(-1)[positives.rows]
            centerness_loss = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
            losses["loss_centerness"] = weighted_mean(centerness_loss, None, num_positives)
        return losses


@dataclass(frozen=True)
class GeneralizedFocal:
    """GFL (Li et al., NeurIPS 2020, arXiv 2006.04388) and GFLv2 (CVPR 2021, arXiv 2011.12885).

    ``loss_cls`` is the quality focal loss divided by the number of positives (an image without any counts as one),
    ``loss_box_reg`` and ``loss_dfl`` are means over the positives weighted by their scores.

    Attributes:
        quality_beta: exponent of the quality focal loss.
        box_loss, box_loss_weight: the box loss and its factor.
        dfl_weight: factor on the distribution focal loss.
        normalizer_floor: lower bound of the sum of scores that the box losses are divided by.
        on_logits: whether the class loss is taken on logits; False takes it on ``class_scores``, as GFLv2 does.
    """

    quality_beta: float
    box_loss: BoxLoss
    box_loss_weight: float
    dfl_weight: float
    normalizer_floor: float
    on_logits: bool = True

    def __call__(
        self, detector: TowerDetector, grid: AnchorGrid, outputs: Outputs, assignment: Assignment
    ) -> Losses:
        positives = detector.positives(grid, outputs["deltas"], assignment)
        rows = positives.rows
        # With gradient first: under autocast, a weight's cast that is first made without gradient would stay so.
        scores = None if self.on_logits else detector.class_scores(outputs)
        with torch.no_grad():
            quality = 1 - linear_iou_loss(positives.boxes, positives.targets)
            targets = torch.zeros_like(outputs["logits"])
            targets[(*rows, assignment.labels[rows])] = quality
            of_positives = outputs["logits"][rows].sigmoid() if scores is None else scores[rows]
            confidence = of_positives.amax(dim=-1)
            num_positives = mean_over_processes(assignment.normalizer).clamp(min=1)
            normalizer = mean_over_processes(confidence.sum()).clamp(min=self.normalizer_floor)

        predictions = outputs["logits"] if scores is None else scores
        class_loss = quality_focal_loss(predictions, targets, self.quality_beta, from_logits=self.on_logits)
        box_loss = self.box_loss(positives.boxes, positives.targets)
        bins = positives.deltas.unflatten(-1, (4, -1))
        dfl = distribution_focal_loss(bins, detector.box_coder.targets(positives.distances)).mean(dim=-1)
        return {
            "loss_cls": weighted_mean(class_loss, assignment.valid[..., None], num_positives),
            "loss_box_reg": weighted_mean(box_loss, confidence, normalizer) * self.box_loss_weight,
            "loss_dfl": weighted_mean(dfl, confidence, normalizer) * self.dfl_weight,
        }


@dataclass(frozen=True)
class TaskAligned:
    """TOOD (Feng et al., ICCV 2021, arXiv 2108.07755), whose assigner gives class scores to reach.

    ``loss_cls`` is the quality focal loss, ``loss_box_reg`` the box loss of the positives weighted by the scores; both
    are divided by the sum of the scores, averaged over the processes.

    Attributes:
        initial: the criterion where the assigner gives no scores.
        quality_beta: exponent of the quality focal loss.
        box_loss, box_loss_weight: the box loss and its factor.
    """

    initial: FocalCenterness
    quality_beta: float
    box_loss: BoxLoss
    box_loss_weight: float

    def __call__(
        self, detector: TowerDetector, grid: AnchorGrid, outputs: Outputs, assignment: Assignment
    ) -> Losses:
        if assignment.scores is None:
            return self.initial(detector, grid, outputs, assignment)
        positives = detector.positives(grid, outputs["deltas"], assignment)
        rows, scores = positives.rows, assignment.scores[positives.rows]
        targets = torch.zeros_like(outputs["logits"])
        targets[(*rows, assignment.labels[rows])] = scores
        normalizer = task_aligned_normalizer(assignment)
        class_loss = quality_focal_loss(outputs["logits"], targets, self.quality_beta)
        box_loss = self.box_loss(positives.boxes, positives.targets)
        return {
            "loss_cls": weighted_mean(class_loss, assignment.valid[..., None], normalizer),
            "loss_box_reg": weighted_mean(box_loss, scores, normalizer) * self.box_loss_weight,
        }


def task_aligned_normalizer(assignment: Assignment) -> torch.Tensor:
    """Return the sum of the positives' targets, 1 each if they are hard, averaged over the processes; at least 1."""
    total = (assignment.foreground if assignment.scores is None else assignment.scores).sum()
    return mean_over_processes(total).clamp(min=1)


def focal_class_loss(
    logits: torch.Tensor, assignment: Assignment, *, alpha: float, gamma: float
) -> torch.Tensor:
    """Return the sum of the focal loss over the logits (N, R, K) of all anchors that are not ignored."""
    rows = assignment.positives
    return focal_loss_sum(logits, (*rows, assignment.labels[rows]), assignment.valid, alpha=alpha, gamma=gamma)


def centerness_normalizer(grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
    """Return the sum of the positives' centerness targets, averaged over the processes, a scalar."""
    centerness = centerness_targets(distances_to_sides(grid.centers, assignment.boxes))
    return mean_over_processes((centerness * assignment.foreground).sum())

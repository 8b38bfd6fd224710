"""GFL and GFLv2: class scores that stand for localisation quality, boxes as distributions."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ..assigners import ATSSAssigner
from ..config.keys import extend_config
from ..losses import (
    distribution_focal_loss,
    linear_iou_loss,
    mean_over_processes,
    quality_focal_loss,
    weighted_mean,
)
from .box_coders import DistributionCoder
from .head import QualityHead, TowerHead
from .keys import dense_head_keys
from .tower_detector import (
    Outputs,
    TowerDetector,
    build_box_loss,
    common_arguments,
    concatenate_levels,
    head_arguments,
    square_anchors,
)


@extend_config
def add_config(cfg: CfgNode) -> None:
    # GFL and GFLv2.
    node = cfg.MODEL.GFL = dense_head_keys()
    # Side of the anchor, in strides.
    node.ANCHOR_SCALE = 8
    # Candidates of a box on each level.
    node.ATSS_TOPK = 9
    node.REG_MAX = 16
    # Exponent of the quality focal loss.
    node.QUALITY_BETA = 2.0
    node.BOX_LOSS = "giou"
    node.BOX_LOSS_WEIGHT = 2.0
    # Weight of the distribution focal loss.
    node.DFL_WEIGHT = 0.25
    # Lower bound of the sum of scores that the box losses are divided by; CrossKD's code has 1.
    node.NORMALIZER_FLOOR = 1e-6
    # GFLv2: number of each side's highest probabilities that the quality branch reads.
    node.QUALITY_TOPK = 4
    # GFLv2: hidden channels of the quality branch.
    node.QUALITY_CHANNELS = 64


@META_ARCH_REGISTRY.register()
class GFL(TowerDetector):
    """Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388), configured by ``MODEL.GFL``.

    Losses are ``loss_cls``, the quality focal loss divided by the number of positives (an image without any
    counts as one), and ``loss_box_reg`` and ``loss_dfl``, means over the positives weighted by their scores.

    Args:
        quality_beta: exponent of the quality focal loss.
        dfl_weight: of the distribution focal loss.
        normalizer_floor: lower bound of the sum of scores that the box losses are divided by.
        kwargs: of :class:`TowerDetector`.
    """

    @configurable
    def __init__(self, *, quality_beta: float, dfl_weight: float, normalizer_floor: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.quality_beta = quality_beta
        self.dfl_weight = dfl_weight
        self.normalizer_floor = normalizer_floor

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.GFL
        arguments, input_shape = common_arguments(cfg, "GFL")
        return {
            **arguments,
            "head": cls.build_head(node, head_arguments(node, input_shape)),
            "anchor_generator": square_anchors(input_shape, scale=node.ANCHOR_SCALE, offset=0.0),
            "assigner": ATSSAssigner(node.ATSS_TOPK),
            "box_coder": DistributionCoder(node.REG_MAX),
            "box_loss": build_box_loss(node.BOX_LOSS, "MODEL.GFL.BOX_LOSS"),
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "quality_beta": node.QUALITY_BETA,
            "dfl_weight": node.DFL_WEIGHT,
            "normalizer_floor": node.NORMALIZER_FLOOR,
        }

    @classmethod
    def build_head(cls, node, arguments: dict[str, Any]) -> TowerHead:
        return TowerHead(num_scores=node.NUM_CLASSES, box_dim=4 * (node.REG_MAX + 1), **arguments)

    def losses(self, anchors, outputs, assignment) -> dict[str, torch.Tensor]:
        whole = concatenate_levels(outputs)
        positives = self.positives(anchors, whole["deltas"], assignment)

        with torch.no_grad():
            quality = 1 - linear_iou_loss(positives.boxes, positives.targets)
            targets = torch.zeros_like(whole["logits"])
            targets[(*positives.rows, assignment.labels[positives.rows])] = quality
            of_positives = {name: output[positives.rows] for name, output in whole.items()}
            confidence = self.class_scores(of_positives).amax(dim=-1)
            num_positives = mean_over_processes(assignment.normalizer).clamp(min=1)
            normalizer = mean_over_processes(confidence.sum()).clamp(min=self.normalizer_floor)

        class_loss = self.class_loss(whole, targets)
        box_loss = self.box_loss(positives.boxes, positives.targets)
        bins = positives.deltas.unflatten(-1, (4, -1))
        dfl = distribution_focal_loss(bins, self.box_coder.targets(positives.distances)).mean(dim=-1)
        return {
            "loss_cls": weighted_mean(class_loss, assignment.valid[..., None], num_positives),
            "loss_box_reg": weighted_mean(box_loss, confidence, normalizer) * self.box_loss_weight,
            "loss_dfl": weighted_mean(dfl, confidence, normalizer) * self.dfl_weight,
        }

    def class_loss(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """Element-wise loss of the class outputs (N, R, num_scores) against quality targets."""
        return quality_focal_loss(outputs["logits"], targets, self.quality_beta)


@META_ARCH_REGISTRY.register()
class GFLv2(GFL):
    """GFLv2 (Li et al., CVPR 2021, arXiv 2011.12885): the scores are multiplied by a predicted quality.

    It has one class output more than classes, whose target is always 0, as the released code has.
    """

    @classmethod
    def build_head(cls, node, arguments: dict[str, Any]) -> QualityHead:
        return QualityHead(
            num_scores=node.NUM_CLASSES + 1,
            reg_max=node.REG_MAX,
            quality_topk=node.QUALITY_TOPK,
            quality_channels=node.QUALITY_CHANNELS,
            **arguments,
        )

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        return outputs["logits"].float().sigmoid() * self.head.quality(outputs["deltas"]).float()

    def class_loss(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        return quality_focal_loss(self.class_scores(outputs), targets, self.quality_beta, from_logits=False)

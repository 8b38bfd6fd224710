"""GFL and GFLv2: class scores that stand for localization quality, boxes as distributions."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ..assigners import ATSSAssigner
from ..config.keys import extend_config
from .box_coders import DistributionCoder
from .criteria import GeneralizedFocal, Outputs
from .head import QualityHead, TowerHead
from .keys import dense_head_keys
from .tower_detector import TowerDetector, build_box_loss, common_arguments, head_arguments, square_anchors


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
    """Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388), configured by ``MODEL.GFL``."""

    config_node = "GFL"

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.GFL
        arguments, head = _arguments(cfg, on_logits=True)
        box_dim = 4 * (node.REG_MAX + 1)
        return {**arguments, "head": TowerHead(num_scores=node.NUM_CLASSES, box_dim=box_dim, **head)}


@META_ARCH_REGISTRY.register()
class GFLv2(TowerDetector):
    """GFLv2 (Li et al., CVPR 2021, arXiv 2011.12885): the scores are multiplied by a predicted quality.

    It has one class output more than classes, whose target is always 0, as the released code has. Configured by
    ``MODEL.GFL``.
    """

    config_node = "GFL"

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.GFL
        arguments, head = _arguments(cfg, on_logits=False)
        quality_head = QualityHead(
            num_scores=node.NUM_CLASSES + 1,
            reg_max=node.REG_MAX,
            quality_topk=node.QUALITY_TOPK,
            quality_channels=node.QUALITY_CHANNELS,
            **head,
        )
        return {**arguments, "head": quality_head}

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        return outputs["logits"].float().sigmoid() * self.head.quality(outputs["deltas"]).float()


def _arguments(cfg, *, on_logits: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the detector without its head, and those of its head that both versions share."""
    node = cfg.MODEL.GFL
    arguments, input_shape = common_arguments(cfg, "GFL")
    arguments.update(
        anchor_generator=square_anchors(input_shape, scale=node.ANCHOR_SCALE, offset=0.0),
        assigner=ATSSAssigner(node.ATSS_TOPK),
        box_coder=DistributionCoder(node.REG_MAX),
        criterion=GeneralizedFocal(
            quality_beta=node.QUALITY_BETA,
            box_loss=build_box_loss(node.BOX_LOSS, "MODEL.GFL.BOX_LOSS"),
            box_loss_weight=node.BOX_LOSS_WEIGHT,
            dfl_weight=node.DFL_WEIGHT,
            normalizer_floor=node.NORMALIZER_FLOOR,
            on_logits=on_logits,
        ),
    )
    return arguments, head_arguments(node, input_shape)

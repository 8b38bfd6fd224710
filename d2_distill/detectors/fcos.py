"""FCOS: Detectron2's own, made selectable by config, and one with the options of the published forms."""

from __future__ import annotations

from typing import Any, Dict

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos

from ..assigners import Assignment, PointAssigner
from ..errors import UserError
from .box_coders import DistanceCoder, DistributionCoder
from .focal import CenternessDetector
from .head import TowerHead
from .one_stage import Outputs, build_box_loss, common_arguments, head_arguments, square_anchors


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al., ICCV 2019), configured by ``MODEL.FCOS``."""

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        node = cfg.MODEL.FCOS
        arguments, input_shape = common_arguments(cfg, "FCOS")
        return {
            **arguments,
            "head": fcos.FCOSHead(num_classes=node.NUM_CLASSES, **head_arguments(node, input_shape)),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }


@META_ARCH_REGISTRY.register()
class OpenMMLabFCOS(CenternessDetector):
    """FCOS with the options of the paper, OpenMMLab and AdelaiDet, configured by ``MODEL.FCOS``.

    The paper's first form (arXiv 1904.01355), which CrossKD uses, is CENTER_SAMPLING_RADIUS 0, DISTANCES
    "exp", CENTERNESS_ON "cls", BOX_LOSS "iou". The improvements of its later releases are
    CENTER_SAMPLING_RADIUS 1.5, DISTANCES "relu", CENTERNESS_ON "box", BOX_LOSS "giou"; AdelaiDet's own also
    has IOU_OFFSET 1, TOWER_BIAS and SQRT_SCORES. With REG_MAX above 0 it predicts distributions, as
    localisation distillation needs.

    Args:
        sqrt_scores: detections are ranked by the square root of class score times centerness.
        kwargs: of :class:`CenternessDetector`.
    """

    ignores_padding = False

    @configurable
    def __init__(self, *, sqrt_scores: bool, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sqrt_scores = sqrt_scores

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        node = cfg.MODEL.FCOS
        arguments, input_shape = common_arguments(cfg, "FCOS")
        _check(node)
        coder = DistributionCoder(node.REG_MAX) if node.REG_MAX else DistanceCoder(node.DISTANCES)
        offset = {"offset": node.IOU_OFFSET} if node.IOU_OFFSET else {}
        return {
            **arguments,
            "head": TowerHead(
                **head_arguments(node, input_shape),
                num_scores=node.NUM_CLASSES,
                box_dim=coder.box_dim,
                tower_bias=node.TOWER_BIAS or not node.NORM,
                centerness_on=node.CENTERNESS_ON,
            ),
            "anchor_generator": square_anchors(input_shape, scale=1.0, offset=0.5),
            "assigner": PointAssigner(tuple(node.SIZES_OF_INTEREST), node.CENTER_SAMPLING_RADIUS),
            "box_coder": coder,
            "box_loss": build_box_loss(node.BOX_LOSS, "MODEL.FCOS.BOX_LOSS", **offset),
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "normalizer_floor": 1e-6,
            "sqrt_scores": node.SQRT_SCORES,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }

    def num_positives(self, assignment: Assignment) -> torch.Tensor:
        return assignment.foreground.sum()

    def final_scores(self, scores: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        product = super().final_scores(scores, outputs)
        return product.sqrt() if self.sqrt_scores else product


def _check(node) -> None:
    """Reject what the options of ``MODEL.FCOS`` cannot mean."""
    for key, value, choices in (
        ("DISTANCES", node.DISTANCES, ("exp", "relu")),
        ("CENTERNESS_ON", node.CENTERNESS_ON, ("box", "cls")),
    ):
        if value not in choices:
            raise UserError(f"MODEL.FCOS.{key} is {value!r}; choose from {', '.join(choices)}.")
    if node.IOU_OFFSET and node.BOX_LOSS in ("diou", "ciou"):
        raise UserError(
            f"MODEL.FCOS.IOU_OFFSET is {node.IOU_OFFSET}, which the box loss {node.BOX_LOSS!r} does not "
            "have; set it to 0, or MODEL.FCOS.BOX_LOSS to giou, iou or linear_iou."
        )
    if len(node.SIZES_OF_INTEREST) != len(node.IN_FEATURES) - 1:
        raise UserError(
            f"MODEL.FCOS.SIZES_OF_INTEREST has {len(node.SIZES_OF_INTEREST)} bounds, but the "
            f"{len(node.IN_FEATURES)} levels of MODEL.FCOS.IN_FEATURES need {len(node.IN_FEATURES) - 1}; "
            "give one between each two levels."
        )

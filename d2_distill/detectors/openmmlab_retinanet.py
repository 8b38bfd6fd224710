"""RetinaNet trained in OpenMMLab's convention, in which published distillation numbers were obtained."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import build_anchor_generator

from ..assigners import Assignment, MaxIoUAssigner
from ..boxes.anchor_grid import AnchorGrid
from ..config.keys import extend_config
from .box_coders import DeltaCoder, DistributionCoder
from .criteria import FocalBoxes
from .head import TowerHead
from .tower_detector import TowerDetector, build_box_loss, common_arguments, head_arguments


@extend_config
def add_config(cfg: CfgNode) -> None:
    # OpenMMLabRetinaNet reads MODEL.RETINANET and these. Last bin of each side's distribution; 0 for box deltas.
    cfg.MODEL.RETINANET.REG_MAX = 0
    # Weight of the box loss.
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # Divide the losses by the positives of each process's batch, as OpenMMLab does, not by their mean over the processes.
    cfg.MODEL.RETINANET.NORMALIZE_PER_PROCESS = False


@META_ARCH_REGISTRY.register()
class OpenMMLabRetinaNet(TowerDetector):
    """RetinaNet (arXiv 1708.02002) with Detectron2's config, state-dict names and anchor order, but

    - the losses are divided by the batch's positives (``Assignment.normalizer``), averaged over the processes unless
      ``MODEL.RETINANET.NORMALIZE_PER_PROCESS``, not by a running mean;
    - a box claims its best anchors from other boxes (:func:`~d2_distill.assigners.match_max_iou`);
    - anchors of cells that are only batch padding are ignored;
    - width and height deltas are clamped on both sides when decoded;
    - BBOX_REG_LOSS_TYPE "smooth_l1" means the L1 loss of deltas; any other name is a loss of boxes.

    With ``MODEL.RETINANET.REG_MAX`` above 0 it predicts distributions of distances from the anchors' centres,
    as localisation distillation needs; then the loss must be one of boxes.
    """

    config_node = "RETINANET"

    @configurable
    def __init__(self, *, normalizes_per_process: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.normalizes_per_process = normalizes_per_process

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.RETINANET
        arguments, input_shape = common_arguments(cfg, "RETINANET")
        anchor_generator = build_anchor_generator(cfg, input_shape)
        coder = DistributionCoder(node.REG_MAX) if node.REG_MAX else DeltaCoder(node.BBOX_REG_WEIGHTS)
        box_loss = None
        if node.BBOX_REG_LOSS_TYPE != "smooth_l1" or node.REG_MAX:
            box_loss = build_box_loss(node.BBOX_REG_LOSS_TYPE, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
        return {
            **arguments,
            "normalizes_per_process": node.NORMALIZE_PER_PROCESS,
            "head": TowerHead(
                **head_arguments(node, input_shape),
                num_scores=node.NUM_CLASSES,
                box_dim=coder.box_dim,
                num_anchors=anchor_generator.num_anchors[0],
                tower_bias=True,
                use_scale=False,
            ),
            "anchor_generator": anchor_generator,
            "assigner": MaxIoUAssigner(tuple(node.IOU_THRESHOLDS), tuple(node.IOU_LABELS)),
            "box_coder": coder,
            "criterion": FocalBoxes(
                focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
                focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
                box_loss=box_loss,
                box_loss_weight=node.BBOX_REG_LOSS_WEIGHT,
            ),
        }

    def normalizer(self, grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
        return assignment.normalizer if self.normalizes_per_process else super().normalizer(grid, assignment)

"""TOOD: one head for both tasks, trained on anchors that do well in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage

from ..assigners import Assigner, Assignment, ATSSAssigner, GroundTruth, Match, Predicted, TaskAlignedAssigner
from ..boxes.anchor_grid import AnchorGrid
from ..config.keys import extend_config
from ..errors import UserError
from .box_coders import DistanceCoder
from .criteria import FocalCenterness, TaskAligned, task_aligned_normalizer
from .keys import dense_head_keys
from .task_aligned_head import TaskAlignedHead
from .tower_detector import TowerDetector, build_box_loss, common_arguments, head_arguments, square_anchors


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.TOOD = dense_head_keys()
    # Blocks of the one tower, all of which classes and boxes are predicted from.
    node.NUM_CONVS = 6
    # Iterations in which targets and losses are those of ATSS; a third of the 1x schedule, as published.
    node.INITIAL_ITERS = 30000
    # Side of the anchor, in strides, by which ATSS assigns.
    node.ANCHOR_SCALE = 8
    # Candidates of a box on each level, for ATSS.
    node.ATSS_TOPK = 9
    # Focal loss of the initial iterations.
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Afterwards the TOPK best aligned anchors of a box are its candidates: by score^ALIGNMENT_ALPHA * IoU^ALIGNMENT_BETA
    # of what they predict.
    node.TOPK = 13
    node.ALIGNMENT_ALPHA = 1.0
    node.ALIGNMENT_BETA = 6.0
    # Exponent of the quality focal loss.
    node.QUALITY_BETA = 2.0
    node.BOX_LOSS = "giou"
    node.BOX_LOSS_WEIGHT = 2.0


@dataclass(frozen=True)
class InitialAssigner:
    """One assigner until the trainer has done ``iterations``, then another, also where there is no trainer.

    It has no state, so a resumed run goes on with the right one.
    """

    initial: Assigner
    later: Assigner
    iterations: int

    @property
    def assigns_points(self) -> bool:
        return self.later.assigns_points

    @property
    def reads_predictions(self) -> bool:
        return self.initial.reads_predictions or self.later.reads_predictions

    def __call__(self, grid: AnchorGrid, truth: GroundTruth, predicted: Predicted) -> Match:
        return self.current()(grid, truth, predicted)

    def current(self) -> Assigner:
        try:
            iteration = get_event_storage().iter
        except AssertionError:  # no trainer
            return self.later
        return self.initial if iteration < self.iterations else self.later


@META_ARCH_REGISTRY.register()
class TOOD(TowerDetector):
    """TOOD (Feng et al., ICCV 2021, arXiv 2108.07755) without anchor boxes, configured by ``MODEL.TOOD``.

    For the first ``INITIAL_ITERS`` iterations targets and losses are those of ATSS without centerness.
    """

    config_node = "TOOD"

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.TOOD
        _check(node)
        arguments, input_shape = common_arguments(cfg, "TOOD")
        boxes = {
            "box_loss": build_box_loss(node.BOX_LOSS, "MODEL.TOOD.BOX_LOSS"),
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
        }
        initial = FocalCenterness(
            focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
            focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
            normalizer_floor=1.0,
            counts_empty_images=False,
            **boxes,
        )
        return {
            **arguments,
            "head": TaskAlignedHead(num_classes=node.NUM_CLASSES, **head_arguments(node, input_shape)),
            "anchor_generator": square_anchors(input_shape, scale=node.ANCHOR_SCALE, offset=0.0),
            "assigner": InitialAssigner(
                ATSSAssigner(node.ATSS_TOPK),
                TaskAlignedAssigner(topk=node.TOPK, alpha=node.ALIGNMENT_ALPHA, beta=node.ALIGNMENT_BETA),
                node.INITIAL_ITERS,
            ),
            "box_coder": DistanceCoder("none"),
            "criterion": TaskAligned(initial=initial, quality_beta=node.QUALITY_BETA, **boxes),
        }

    def normalizer(self, grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
        return task_aligned_normalizer(assignment)


def _check(node) -> None:
    """Reject what the options of ``MODEL.TOOD`` cannot mean."""
    for key in ("NUM_CONVS", "ATSS_TOPK", "TOPK"):
        if node[key] < 1:
            raise UserError(f"MODEL.TOOD.{key} is {node[key]}; it must be at least 1.")

"""An R-CNN head as assistant: Detectron2's RoI heads, trained on RoIs of a student's features."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Instances
from torch import nn

from ..detectors.roi_heads import RoIStage, StagedRoIHeads
from ..errors import UserError
from ..staged import StagedDetector
from .copying import copy_weights
from .proposals import with_ground_truth

logger = logging.getLogger(__name__)
# A cascade's later stages count less (OpenMMLab, and with it HEAD): 1, 1/2, 1/4.
STAGE_WEIGHT_DECAY = 0.5
NAMES = ("StandardROIHeads", "CascadeROIHeads")
# Detectron2's default of MODEL.ROI_HEADS.NAME, which the config of a dense student leaves as it is.
UNDESCRIBED = "Res5ROIHeads"
NUM_FC = 2  # as published


@dataclass(frozen=True)
class RoIAssistance:
    """What an assistant makes of a batch.

    Attributes:
        stages: its stages, one for StandardROIHeads, with the RoIs and vectors of each.
        losses: its own losses on ground truth, by Detectron2's names.
    """

    stages: list[RoIStage]
    losses: dict[str, torch.Tensor]


class RoIAssistant(nn.Module):
    """An R-CNN or Cascade R-CNN head on the features of a student of any kind (HEAD, ECCV 2022).

    Below ``roi_heads`` the names in its state dict are Detectron2's.

    Args:
        roi_heads: StandardROIHeads or CascadeROIHeads that do not add ground truth to proposals themselves.
    """

    def __init__(self, roi_heads: StandardROIHeads) -> None:
        super().__init__()
        self.roi_heads = roi_heads
        self.staged = StagedRoIHeads(roi_heads)

    @classmethod
    def build(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], num_classes: int, owner: str = "student"
    ) -> "RoIAssistant":
        """The box branch that a config describes, for other features and classes than the config's own.

        A box of side 56 pixels or less is pooled from the finest feature, whatever its stride; with P2 that is
        Detectron2's own rule. So assistant and teacher take a box from features of the same rank.

        Args:
            cfg: whose ROI_HEADS, ROI_BOX_HEAD and ROI_BOX_CASCADE_HEAD describe it. A student's config that does not gives
                it two fully connected layers.
            input_shape: features that it reads, fine to coarse, see :func:`roi_features`.
            num_classes: of the foreground.
            owner: of the config, "student" or "teacher", for error messages.

        Raises:
            UserError: the config has other RoI heads, or a box head without fully connected layers.
        """
        cfg = cfg.clone()
        cfg.defrost()
        if owner == "student" and cfg.MODEL.ROI_HEADS.NAME == UNDESCRIBED:
            logger.info(
                "The config describes no RoI heads for the R-CNN assistant: it gets %d fully connected layers of %d.",
                NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
            )
            cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
            cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=NUM_FC, POOLER_RESOLUTION=7)
        _check(cfg, owner)
        cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
        cfg.MODEL.ROI_HEADS.IN_FEATURES = list(input_shape)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
        # Ground truth is added by `sample`, which marks it.
        cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = False
        roi_heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)
        strides = [shape.stride for shape in input_shape.values()]
        node = cfg.MODEL.ROI_BOX_HEAD
        roi_heads.box_pooler = ROIPooler(
            output_size=node.POOLER_RESOLUTION,
            scales=[1 / stride for stride in strides],
            sampling_ratio=node.POOLER_SAMPLING_RATIO,
            pooler_type=node.POOLER_TYPE,
            canonical_level=2 + int(math.log2(strides[0])),
        )
        return cls(roi_heads)

    def load(self, teacher: StandardROIHeads) -> None:
        """Copy the box branch of the teacher's RoI heads.

        Raises:
            UserError: it is of another shape.
        """
        copy_weights(self.roi_heads, teacher)

    @torch.no_grad()
    def sample(self, proposals: list[Instances], gt_instances: list[Instances]) -> list[Instances]:
        """Label proposals and ground-truth boxes and draw a sample, as the RoI heads do; further fields are kept.

        Args:
            proposals: per image, what :class:`~d2_distill.assistants.proposals.DenseProposer` proposes.
        """
        proposals = with_ground_truth(proposals, gt_instances)
        return self.roi_heads.label_and_sample_proposals(proposals, gt_instances)

    def forward(
        self, features: dict[str, torch.Tensor], sampled: list[Instances], gt_instances: list[Instances]
    ) -> RoIAssistance:
        """
        Args:
            features: (N, C, H, W) of each name that it reads.
            sampled: labelled RoIs, one entry an image, which the first stage takes as they are.
        """
        stages = self.staged.run(features, sampled, gt_instances)
        weights = [STAGE_WEIGHT_DECAY**index for index in range(self.staged.num_stages)]
        return RoIAssistance(stages, self.staged.losses(stages, weights))


def roi_features(
    student: StagedDetector, names: Sequence[str], key: str, count: int = 4
) -> dict[str, ShapeSpec]:
    """The student's features that an R-CNN assistant reads, fine to coarse.

    Args:
        names: the features wanted; empty takes the ``count`` finest, or all if there are fewer.
        key: config key of ``names``, for error messages.

    Raises:
        UserError: a name is unknown, or the strides do not double from one to the next.
    """
    shapes = student.feature_shapes()
    for name in names:
        if name not in shapes:
            raise UserError(f"{key} has {name!r}, which the student lacks; choose from {', '.join(shapes)}.")
    by_stride = sorted(shapes, key=lambda name: shapes[name].stride)
    chosen = {name: shapes[name] for name in names or by_stride[:count]}
    strides = [shape.stride for shape in chosen.values()]
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
        raise UserError(
            f"{key}: RoIs cannot be pooled from {', '.join(chosen)} of strides {strides}; name features whose "
            "strides double from one to the next."
        )
    return chosen


def _check(cfg: CfgNode, owner: str) -> None:
    if cfg.MODEL.ROI_HEADS.NAME not in NAMES:
        raise UserError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r} in the {owner}'s config, which describes the R-CNN "
            f"assistant; set it to one of {', '.join(NAMES)}."
        )
    node = cfg.MODEL.ROI_BOX_HEAD
    if node.NAME != "FastRCNNConvFCHead" or node.NUM_FC < 1:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD has NAME {node.NAME!r} and NUM_FC {node.NUM_FC} in the {owner}'s config, which "
            "describes the R-CNN assistant; its box head needs fully connected layers: set NAME to "
            "'FastRCNNConvFCHead' and NUM_FC to 1 or more."
        )

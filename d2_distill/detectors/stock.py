"""Stages of Detectron2's own detectors: RetinaNet, FCOS, GeneralizedRCNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from torch import nn

from ..staged import Assignment, Run, StagedDense, StagedDetector, Tower, register_staged, stage
from .roi_heads import RoIStage, StagedRoIHeads, keep_roi_classes


@register_staged(RetinaNet)
class StagedRetinaNet(StagedDense):
    """RetinaNet and its subclasses; outputs ``logits`` (K per anchor) and ``deltas`` (4)."""

    averages_normalizer = False

    def __init__(self, model: RetinaNet) -> None:
        super().__init__(model)
        head = model.head
        self.towers = {"cls": Tower(head.cls_subnet), "box": Tower(head.bbox_subnet)}
        self.predictors = {"logits": ("cls", head.cls_score), "deltas": ("box", head.bbox_pred)}

    def losses(self, anchors, outputs, assignment: Assignment) -> dict[str, torch.Tensor]:
        return self.model.losses(
            anchors, outputs["logits"], list(assignment.labels), outputs["deltas"], list(assignment.boxes)
        )


@register_staged(FCOS)
class StagedFCOS(StagedRetinaNet):
    """FCOS; one anchor a location, and ``centerness`` on the box tower."""

    assigns_points = True
    averages_normalizer = True

    def __init__(self, model: FCOS) -> None:
        super().__init__(model)
        self.predictors["centerness"] = ("box", model.head.ctrness)

    def losses(self, anchors, outputs, assignment: Assignment) -> dict[str, torch.Tensor]:
        return self.model.losses(
            anchors, outputs["logits"], list(assignment.labels), outputs["deltas"], list(assignment.boxes),
            outputs["centerness"],
        )


@register_staged(GeneralizedRCNN)
class StagedRCNN(StagedDetector):
    """Two-stage detectors: features, proposals, RoI heads.

    Attributes:
        roi_heads: the RoI heads in stages, if they are StandardROIHeads with boxes only; None for any other RoI heads,
            which run as a whole.
    """

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__(model)
        self.roi_heads = StagedRoIHeads(model.roi_heads) if _is_one_box_branch(model.roi_heads) else None

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def keep_classes(self, classes: Sequence[int]) -> None:
        keep_roi_classes(self.model.roi_heads, classes)

    def feature_shapes(self) -> dict[str, ShapeSpec]:
        shapes = self.model.backbone.output_shape()
        return dict(sorted(shapes.items(), key=lambda item: item[1].stride))

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> "RCNNRun":
        return RCNNRun(self, images, gt_instances, taps or {}, frozen)


class RCNNRun(Run):
    """A batch going through a two-stage detector."""

    @stage
    def _rpn(self):
        return self.staged.model.proposal_generator(self.images, self.features, self.gt_instances)

    @property
    def proposals(self) -> list[Instances]:
        """Per image: ``proposal_boxes`` and ``objectness_logits``, best first."""
        return self._rpn[0]

    @stage
    def rois(self) -> list[RoIStage]:
        """The box branch on the sampled proposals, in training; nothing if the RoI heads run as a whole."""
        if self.staged.roi_heads is None:
            return []
        sampled = self.staged.model.roi_heads.label_and_sample_proposals(self.proposals, self.gt_instances)
        return self.staged.roi_heads.run(self.features, sampled, self.gt_instances)

    @stage
    def _roi_stage(self) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Sampled proposals and losses of the RoI heads."""
        if self.rois:
            return self.rois[0].proposals, self.staged.roi_heads.losses(self.rois)
        return self.staged.model.roi_heads(self.images, self.features, self.proposals, self.gt_instances)

    @property
    def sampled_proposals(self) -> list[Instances]:
        """Per image, in training: the proposals that the RoI losses are on, with ``gt_classes``."""
        return self.rois[0].proposals if self.rois else self._roi_stage[0]

    @stage
    def losses(self) -> dict[str, torch.Tensor]:
        return {**self._roi_stage[1], **self._rpn[1]}


def _is_one_box_branch(roi_heads: nn.Module) -> bool:
    # Attributes of Detectron2's own; the embedded one has boxes only.
    more = ("mask_on", "keypoint_on", "train_on_pred_boxes")
    return type(roi_heads) is StandardROIHeads and not any(getattr(roi_heads, key, False) for key in more)

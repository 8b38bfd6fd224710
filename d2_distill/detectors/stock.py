"""Stages of Detectron2's own detectors: RetinaNet, FCOS, GeneralizedRCNN."""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances

from ..staged import Assignment, Run, StagedDense, StagedDetector, Tower, register_staged, stage


@register_staged(RetinaNet)
class StagedRetinaNet(StagedDense):
    """RetinaNet and its subclasses; outputs ``logits`` (K per anchor) and ``deltas`` (4)."""

    averages_normalizer = False

    def __init__(self, model: RetinaNet) -> None:
        super().__init__(model)
        head = model.head
        self.towers = {"cls": Tower(head.cls_subnet), "box": Tower(head.bbox_subnet)}
        self.predictors = {"logits": ("cls", head.cls_score), "deltas": ("box", head.bbox_pred)}

    def losses(self, anchors, outputs, assignment: Assignment) -> Dict[str, torch.Tensor]:
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

    def losses(self, anchors, outputs, assignment: Assignment) -> Dict[str, torch.Tensor]:
        return self.model.losses(
            anchors, outputs["logits"], list(assignment.labels), outputs["deltas"], list(assignment.boxes),
            outputs["centerness"],
        )


@register_staged(GeneralizedRCNN)
class StagedRCNN(StagedDetector):
    """Two-stage detectors: features, proposals, RoI heads."""

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def feature_shapes(self) -> Dict[str, ShapeSpec]:
        shapes = self.model.backbone.output_shape()
        return dict(sorted(shapes.items(), key=lambda item: item[1].stride))

    def predict_regions(
        self, features: Dict[str, torch.Tensor], boxes: List[Boxes]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The box head of StandardROIHeads on the R boxes of all images.

        Args:
            features: (N, C, H, W) of each name that the head reads; they may be another detector's.
            boxes: per image, in pixels of the batch.

        Returns:
            class logits (R, K + 1), background last, and box deltas (R, 4K), or (R, 4) if they are class-agnostic.
        """
        heads = self.model.roi_heads
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        return heads.box_predictor(heads.box_head(pooled))

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> "RCNNRun":
        return RCNNRun(self, images, gt_instances, taps or {}, frozen)


class RCNNRun(Run):
    """A batch going through a two-stage detector."""

    @stage
    def _rpn(self):
        return self.staged.model.proposal_generator(self.images, self.features, self.gt_instances)

    @property
    def proposals(self) -> List[Instances]:
        """Per image: ``proposal_boxes`` and ``objectness_logits``, best first."""
        return self._rpn[0]

    @stage
    def _rois(self):
        roi_heads = self.staged.model.roi_heads
        return roi_heads(self.images, self.features, self.proposals, self.gt_instances)

    @property
    def sampled_proposals(self) -> List[Instances]:
        """Per image, in training: the proposals that the losses of StandardROIHeads are on, with ``gt_classes``."""
        return self._rois[0]

    @stage
    def losses(self) -> Dict[str, torch.Tensor]:
        return {**self._rois[1], **self._rpn[1]}

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

from ..assigners import Assignment
from ..layers.tower import Tower
from ..staged import Run, StagedDense, StagedDetector, register_staged, stage
from .criteria import centerness_normalizer
from .head import predictors_at_ends
from .roi_heads import RoIStage, StagedRoIHeads, keep_roi_classes


@register_staged(RetinaNet)
class StagedRetinaNet(StagedDense):
    """RetinaNet and its subclasses; outputs ``logits`` (K per anchor) and ``deltas`` (4)."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__(model)
        self.towers = {"cls": Tower(model.head.cls_subnet), "box": Tower(model.head.bbox_subnet)}
        self.predictors = predictors_at_ends(self.towers, self.layers())

    @classmethod
    def num_classes_key(cls, model_class, cfg) -> str:
        return "MODEL.RETINANET.NUM_CLASSES"

    def layers(self) -> dict[str, tuple[str, nn.Module]]:
        """Output -> (branch, prediction layer)."""
        return {"logits": ("cls", self.model.head.cls_score), "deltas": ("box", self.model.head.bbox_pred)}

    def assign(self, grid, truth, outputs) -> Assignment:
        labels, boxes = self.model.label_anchors(grid.level_boxes(), truth.instances)
        return Assignment(torch.stack(labels), torch.stack(boxes), self.num_classes)

    def losses(self, grid, outputs, assignment: Assignment) -> dict[str, torch.Tensor]:
        # Detectron2 takes levels, which here are views, and images.
        levels = {name: list(grid.split(output)) for name, output in outputs.items()}
        return self.model.losses(
            grid.level_boxes(), levels["logits"], list(assignment.labels), levels["deltas"], list(assignment.boxes),
            *(levels[name] for name in levels if name not in ("logits", "deltas")),
        )

    def normalizer(self, grid, assignment) -> torch.Tensor:
        return assignment.normalizer


@register_staged(FCOS)
class StagedFCOS(StagedRetinaNet):
    """FCOS; one anchor a location, and ``centerness`` on the box tower."""

    assigns_points = True

    @classmethod
    def num_classes_key(cls, model_class, cfg) -> str:
        return "MODEL.FCOS.NUM_CLASSES"

    def layers(self) -> dict[str, tuple[str, nn.Module]]:
        return {**super().layers(), "centerness": ("box", self.model.head.ctrness)}

    def losses(self, grid, outputs, assignment: Assignment) -> dict[str, torch.Tensor]:
        # Detectron2's GIoU loss cannot compare boxes in half precision with others.
        return super().losses(grid, {**outputs, "deltas": outputs["deltas"].float()}, assignment)

    def normalizer(self, grid, assignment) -> torch.Tensor:
        return centerness_normalizer(grid, assignment)


@register_staged(GeneralizedRCNN)
class StagedRCNN(StagedDetector):
    """Two-stage detectors: features, proposals, RoI heads.

    Attributes:
        roi_heads: the box branch in stages, of StandardROIHeads and what is derived from them; None for other RoI heads.
        has_roi_stages: the RoI heads are StandardROIHeads with boxes only; others are trained as a whole.
    """

    family = "two-stage"

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__(model)
        is_standard = isinstance(model.roi_heads, StandardROIHeads)
        self.roi_heads = StagedRoIHeads(model.roi_heads) if is_standard else None
        self.has_roi_stages = _is_one_box_branch(model.roi_heads)

    @classmethod
    def num_classes_key(cls, model_class, cfg) -> str:
        return "MODEL.ROI_HEADS.NUM_CLASSES"

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    @property
    def score_threshold(self) -> float:
        predictors = self.model.roi_heads.box_predictor
        return (predictors[-1] if isinstance(predictors, nn.ModuleList) else predictors).test_score_thresh

    def keep_classes(self, classes: Sequence[int]) -> None:
        keep_roi_classes(self.model.roi_heads, classes)

    def traits(self) -> list[str]:
        return [type(self.model.roi_heads).__name__]

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
        """The box branch on the sampled proposals, in training; nothing if the RoI heads are trained as a whole."""
        if not self.staged.has_roi_stages:
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

"""CascadeROIHeads (Cascade R-CNN, arXiv 1712.00726): box heads in a row, each refines the boxes of the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..box_regression import Box2BoxTransform
from ..matcher import Matcher
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers, Predictions, fast_rcnn_inference
from .roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """Stages of box head and class-agnostic predictor, each trained at an IoU threshold of its own."""

    @configurable
    def __init__(
        self, *, box_heads: Sequence[nn.Module], box_predictors: Sequence[nn.Module],
        proposal_matchers: Sequence[Matcher], **kwargs,
    ):
        """
        Args:
            box_heads, box_predictors, proposal_matchers: one a stage; the first stage's matcher is not used, as its
                proposals are sampled.
            kwargs: of StandardROIHeads.
        """
        super().__init__(
            box_head=nn.ModuleList(box_heads), box_predictor=nn.ModuleList(box_predictors), **kwargs)
        self.num_cascade_stages = len(box_heads)
        self.proposal_matchers = list(proposal_matchers)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        heads, cascade = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_CASCADE_HEAD
        assert cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG, (
            "CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True.")
        assert len(cascade.IOUS) == len(cascade.BBOX_REG_WEIGHTS), (
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS and .BBOX_REG_WEIGHTS must have one entry a stage.")
        assert cascade.IOUS[0] == heads.IOU_THRESHOLDS[0], (
            "The first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS must be MODEL.ROI_HEADS.IOU_THRESHOLDS[0].")
        pooling, pooled_shape = cls._init_pooling(cfg, input_shape)
        box_heads, box_predictors = [], []
        for weights in cascade.BBOX_REG_WEIGHTS:
            box_heads.append(build_box_head(cfg, pooled_shape))
            box_predictors.append(FastRCNNOutputLayers(
                cfg, box_heads[-1].output_shape, box2box_transform=Box2BoxTransform(weights=weights)))
        return {
            **pooling,
            "box_heads": box_heads,
            "box_predictors": box_predictors,
            "proposal_matchers": [Matcher([iou], [0, 1]) for iou in cascade.IOUS],
        }

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """``loss_cls_stage0``, ``loss_box_reg_stage0``, ``loss_cls_stage1``, ..."""
        losses = {}
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._label(self._refine(predictions, proposals, stage), targets, stage)
            predictions = self._predict(features, proposals, stage)
            with get_event_storage().name_scope(f"stage{stage}"):
                of_stage = predictor.losses(predictions, proposals)
            losses.update({f"{name}_stage{stage}": loss for name, loss in of_stage.items()})
        return losses

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """Boxes of the last stage with the mean of all stages' class probabilities."""
        probs = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._refine(predictions, proposals, stage)
            predictions = self._predict(features, proposals, stage)
            probs.append(predictor.predict_probs(predictions, proposals))
        return fast_rcnn_inference(
            predictor.predict_boxes(predictions, proposals),
            [sum(of_image) * (1.0 / self.num_cascade_stages) for of_image in zip(*probs)],
            [p.image_size for p in proposals],
            predictor.test_score_thresh, predictor.test_nms_thresh, predictor.test_topk_per_image)[0]

    def _predict(self, features: dict[str, Tensor], proposals: list[Instances], stage: int) -> Predictions:
        pooled = self._pool(features, proposals)
        if pooled.requires_grad:
            # The stages together teach the features as much as one box head would.
            pooled.register_hook(lambda gradient: gradient * (1.0 / self.num_cascade_stages))
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refine(self, predictions: Predictions, proposals: list[Instances], stage: int) -> list[Instances]:
        """Proposals of a stage: the boxes that the last one predicted, in training without empty ones."""
        refined = []
        for last, boxes in zip(proposals, self.box_predictor[stage - 1].predict_boxes(predictions, proposals)):
            boxes = Boxes(boxes)
            boxes.clip(last.image_size)
            if self.training:
                boxes = boxes[boxes.nonempty()]
            refined.append(Instances(last.image_size, proposal_boxes=boxes))
        return refined

    @torch.no_grad()
    def _label(self, proposals: list[Instances], targets: list[Instances], stage: int) -> list[Instances]:
        """Gives each proposal ``gt_classes`` and, where the image has objects, ``gt_boxes`` of its match."""
        for image, target in zip(proposals, targets):
            matches, labels = self.proposal_matchers[stage](pairwise_iou(target.gt_boxes, image.proposal_boxes))
            image.gt_classes = torch.full_like(matches, self.num_classes)
            if len(target) > 0:
                image.gt_boxes = target.gt_boxes[matches]
                image.gt_classes = torch.where(labels == 1, target.gt_classes[matches], self.num_classes)
        classes = torch.cat([image.gt_classes for image in proposals])
        num_background = (classes == self.num_classes).sum().item()
        storage = get_event_storage()
        storage.put_scalar(f"stage{stage}/roi_head/num_fg_samples", (len(classes) - num_background) / len(targets))
        storage.put_scalar(f"stage{stage}/roi_head/num_bg_samples", num_background / len(targets))
        return proposals

"""StandardROIHeads: sampling of proposals for training, and the box branch."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..matcher import Matcher
from ..poolers import ROIPooler
from ..proposal_generator.proposal_utils import add_ground_truth_to_proposals
from ..sampling import subsample_labels
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = "Modules (cfg, input_shape) that detect from features and proposals."


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(nn.Module):
    """Box branch on RoIs pooled from several feature maps: pooler, head, predictor."""

    @configurable
    def __init__(
        self, *, num_classes: int, batch_size_per_image: int, positive_fraction: float,
        proposal_matcher: Matcher, proposal_append_gt: bool, box_in_features: list[str],
        box_pooler: ROIPooler, box_head: nn.Module, box_predictor: nn.Module,
    ):
        """
        Args:
            batch_size_per_image: sampled proposals, at most ``positive_fraction`` of them foreground.
            proposal_append_gt: ground-truth boxes are proposals too.
        """
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt
        self.box_in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        heads = cfg.MODEL.ROI_HEADS
        return {
            "num_classes": heads.NUM_CLASSES,
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "proposal_matcher": Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS),
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
            **cls._init_box_head(cfg, input_shape),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        pooling, pooled_shape = cls._init_pooling(cfg, input_shape)
        box_head = build_box_head(cfg, pooled_shape)
        return {
            **pooling, "box_head": box_head, "box_predictor": FastRCNNOutputLayers(cfg, box_head.output_shape)
        }

    @staticmethod
    def _init_pooling(
        cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> tuple[dict[str, Any], ShapeSpec]:
        """Arguments that say what is pooled and how, and the shape of a pooled region."""
        names, box_branch = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD
        shapes = [input_shape[name] for name in names]
        channels = {shape.channels for shape in shapes}
        assert len(channels) == 1, f"MODEL.ROI_HEADS.IN_FEATURES must have equal channels, got {channels}."
        side = box_branch.POOLER_RESOLUTION
        pooler = ROIPooler(
            side, [1.0 / shape.stride for shape in shapes], box_branch.POOLER_SAMPLING_RATIO,
            box_branch.POOLER_TYPE)
        pooled_shape = ShapeSpec(channels=channels.pop(), height=side, width=side)
        return {"box_in_features": names, "box_pooler": pooler}, pooled_shape

    def forward(
        self, images: ImageList, features: dict[str, Tensor], proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """In training (sampled proposals, losses), otherwise (detections, {})."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
            return proposals, self._losses(features, proposals, targets)
        return self._detect(features, proposals), {}

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        predictions = self.box_predictor(self.box_head(self._pool(features, proposals)))
        return self.box_predictor.losses(predictions, proposals)

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        predictions = self.box_predictor(self.box_head(self._pool(features, proposals)))
        return self.box_predictor.inference(predictions, proposals)[0]

    def _pool(self, features: dict[str, Tensor], proposals: list[Instances]) -> Tensor:
        maps = [features[name] for name in self.box_in_features]
        return self.box_pooler(maps, [p.proposal_boxes for p in proposals])

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Per image, sampled proposals with ``gt_classes`` and every ``gt_*`` field of their matched object.

        Images without ground truth give background only, and no ``gt_*`` field but the class.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        results = []
        for image_proposals, target in zip(proposals, targets):
            quality = pairwise_iou(target.gt_boxes, image_proposals.proposal_boxes)
            matches, labels = self.proposal_matcher(quality)
            sampled, classes = self._sample_proposals(matches, labels, target.gt_classes)
            result = image_proposals[sampled]
            if len(target) > 0:
                for name, value in target.get_fields().items():
                    if name.startswith("gt_"):
                        result.set(name, value[matches[sampled]])
            result.gt_classes = classes
            results.append(result)

        classes = torch.cat([result.gt_classes for result in results])
        num_background = (classes == self.num_classes).sum().item()
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", (len(classes) - num_background) / len(targets))
        storage.put_scalar("roi_head/num_bg_samples", num_background / len(targets))
        return results

    def _sample_proposals(self, matches: Tensor, labels: Tensor, gt_classes: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the sampled proposals, foreground first, and their classes (K = background)."""
        if gt_classes.numel() > 0:
            classes = gt_classes[matches]
            classes[labels == 0] = self.num_classes
            classes[labels == -1] = -1
        else:
            classes = torch.full_like(matches, self.num_classes)
        sampled = torch.cat(subsample_labels(
            classes, self.batch_size_per_image, self.positive_fraction, self.num_classes))
        return sampled, classes[sampled]

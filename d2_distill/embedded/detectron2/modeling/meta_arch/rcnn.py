"""GeneralizedRCNN: backbone, proposals, RoI heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import ImageList
from torch import nn

from ..backbone import Backbone, build_backbone
from ..postprocessing import detector_postprocess
from ..proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from ..roi_heads import ROI_HEADS_REGISTRY
from .build import META_ARCH_REGISTRY


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(nn.Module):
    """A two-stage detector, Faster R-CNN (arXiv:1506.01497) by default."""

    @configurable
    def __init__(
        self, *, backbone: Backbone, proposal_generator: nn.Module, roi_heads: nn.Module,
        pixel_mean: Sequence[float], pixel_std: Sequence[float],
    ):
        """``pixel_mean`` is subtracted from the channels, which are then divided by ``pixel_std``."""
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        model = cfg.MODEL
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": PROPOSAL_GENERATOR_REGISTRY.get(model.PROPOSAL_GENERATOR.NAME)(cfg, shapes),
            "roi_heads": ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)(cfg, shapes),
            "pixel_mean": model.PIXEL_MEAN,
            "pixel_std": model.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """A dict of losses in training, otherwise ``{"instances": detections}`` of every image.

        Args:
            batched_inputs: per image, ``image`` (C, H, W), in training ``instances`` with ``gt_boxes`` and
                ``gt_classes``, and optionally ``height`` and ``width`` of the wanted output, by default those
                of the image.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            assert "instances" in batched_inputs[0], "training needs ground truth: 'instances' is missing"
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            proposals, proposal_losses = self.proposal_generator(images, features, gt_instances)
            _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
            return {**detector_losses, **proposal_losses}

        proposals, _ = self.proposal_generator(images, features, None)
        results, _ = self.roi_heads(images, features, proposals, None)
        return [
            {"instances": detector_postprocess(result, x.get("height", height), x.get("width", width))}
            for result, x, (height, width) in zip(results, batched_inputs, images.image_sizes)
        ]

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalised and then padded images, on the model's device."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

"""The region proposal network of Faster R-CNN and its standard head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, cat
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..anchor_generator import build_anchor_generator
from ..box_regression import Box2BoxTransform, _dense_box_regression_loss
from ..dense_head import fill_convs, num_anchors_per_pixel, permute_to_N_HWA_K
from ..matcher import Matcher
from ..sampling import subsample_labels
from .proposal_utils import find_top_rpn_proposals

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
PROPOSAL_GENERATOR_REGISTRY.__doc__ = "Modules (cfg, input_shape) -> proposals, called as RPN is."
RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
RPN_HEAD_REGISTRY.__doc__ = "Modules (cfg, input_shape) from feature maps to objectness and anchor deltas."


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolution(s) with ReLU, then two 1x1 convolutions; shared by all levels."""

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)):
        """
        Args:
            num_anchors: anchors per position, the same on each level.
            conv_dims: output channels of the 3x3 convolutions; -1 keeps the number of channels.
        """
        super().__init__()
        channels, convs = in_channels, []
        for dim in conv_dims:
            out_channels = channels if dim == -1 else dim
            convs.append(Conv2d(channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU()))
            channels = out_channels
        if len(convs) == 1:
            self.conv = convs[0]
        else:
            self.conv = nn.Sequential(OrderedDict((f"conv{i}", conv) for i, conv in enumerate(convs)))
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, kernel_size=1)
        fill_convs(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        channels = {shape.channels for shape in input_shape}
        assert len(channels) == 1, f"MODEL.RPN.IN_FEATURES must have equal channels, got {sorted(channels)}."
        return {
            "in_channels": channels.pop(),
            "num_anchors": num_anchors_per_pixel(cfg, input_shape),
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level, objectness logits (N, A, H, W) and deltas (N, A * 4, H, W)."""
        hidden = [self.conv(feature) for feature in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Class-agnostic proposals from anchors ("Faster R-CNN", arXiv:1506.01497)."""

    @configurable
    def __init__(
        self, *, in_features: list[str], head: nn.Module, anchor_generator: nn.Module,
        anchor_matcher: Matcher, box2box_transform: Box2BoxTransform, batch_size_per_image: int,
        positive_fraction: float, pre_nms_topk: tuple[int, int], post_nms_topk: tuple[int, int],
        nms_thresh: float, min_box_size: float, anchor_boundary_thresh: float, loss_weight: dict[str, float],
        box_reg_loss_type: str, smooth_l1_beta: float,
    ):
        """
        Args:
            batch_size_per_image: anchors in the loss, at most ``positive_fraction`` of them positive.
            pre_nms_topk, post_nms_topk: (training, test); see :func:`find_top_rpn_proposals`.
            anchor_boundary_thresh: anchors this far outside the image are ignored; negative: none.
            loss_weight: a factor by name of the loss.
        """
        super().__init__()
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = float(min_box_size)
        self.anchor_boundary_thresh = anchor_boundary_thresh
        self.loss_weight = loss_weight
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        rpn = cfg.MODEL.RPN
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        return {
            "in_features": rpn.IN_FEATURES,
            "head": RPN_HEAD_REGISTRY.get(rpn.HEAD_NAME)(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        }

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals of every image (without gradient), and in training the losses."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        logits = [permute_to_N_HWA_K(x, 1).squeeze(-1) for x in logits]
        deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]

        losses = {}
        if self.training:
            gt_labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image, labels (R,) in {-1: not sampled, 0, 1} and the matched ground-truth boxes (R, 4)."""
        all_anchors = Boxes.cat(anchors)
        gt_labels, matched_gt_boxes = [], []
        for gt in gt_instances:
            matches, labels = self.anchor_matcher(pairwise_iou(gt.gt_boxes, all_anchors))
            if self.anchor_boundary_thresh >= 0:
                labels[~all_anchors.inside_box(gt.image_size, self.anchor_boundary_thresh)] = -1
            positive, negative = subsample_labels(
                labels, self.batch_size_per_image, self.positive_fraction, bg_label=0)
            sampled = torch.full_like(labels, -1)
            sampled[positive], sampled[negative] = 1, 0
            gt_labels.append(sampled)
            boxes = gt.gt_boxes.tensor
            matched_gt_boxes.append(boxes[matches] if len(gt) > 0 else torch.zeros_like(all_anchors.tensor))
        return gt_labels, matched_gt_boxes

    def losses(
        self, anchors: list[Boxes], pred_objectness_logits: list[Tensor], gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor], gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls`` and ``loss_rpn_loc``, sums over ``batch_size_per_image`` times the images.

        Args:
            pred_objectness_logits, pred_anchor_deltas: per level, (N, R_l) and (N, R_l, 4).
            gt_labels, gt_boxes: per image, as :meth:`label_and_sample_anchors` returns them.
        """
        num_images = len(gt_labels)
        labels = torch.stack(gt_labels)
        positive, sampled = labels == 1, labels >= 0
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", positive.sum().item() / num_images)
        storage.put_scalar("rpn/num_neg_anchors", (labels == 0).sum().item() / num_images)

        objectness_loss = F.binary_cross_entropy_with_logits(
            cat(pred_objectness_logits, dim=1)[sampled], labels[sampled].float(), reduction="sum")
        localization_loss = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, positive,
            box_reg_loss_type=self.box_reg_loss_type, smooth_l1_beta=self.smooth_l1_beta)
        normalizer = self.batch_size_per_image * num_images
        losses = {"loss_rpn_cls": objectness_loss, "loss_rpn_loc": localization_loss}
        return {name: loss / normalizer * self.loss_weight[name] for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self, anchors: list[Boxes], pred_objectness_logits: list[Tensor], pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decoded and selected proposals of every image; no gradient flows through them."""
        decoded = []
        for level_anchors, deltas in zip(anchors, pred_anchor_deltas):
            sources = level_anchors.tensor.repeat(len(deltas), 1)
            decoded.append(self.box2box_transform.apply_deltas(deltas.flatten(0, 1), sources).view_as(deltas))
        return find_top_rpn_proposals(
            decoded, pred_objectness_logits, image_sizes, self.nms_thresh, self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training], self.min_box_size, self.training)

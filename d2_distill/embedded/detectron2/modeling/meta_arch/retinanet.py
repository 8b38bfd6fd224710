"""RetinaNet and RetinaNetHead."""

from __future__ import annotations

import math
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, cat, get_norm
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from ..anchor_generator import build_anchor_generator
from ..backbone import build_backbone
from ..box_regression import Box2BoxTransform, _dense_box_regression_loss
from ..dense_head import fill_convs, num_anchors_per_pixel
from ..matcher import Matcher
from .build import META_ARCH_REGISTRY
from .dense_detector import AnchorDetector


@META_ARCH_REGISTRY.register()
class RetinaNet(AnchorDetector):
    """RetinaNet (Lin et al., arXiv:1708.02002).

    Args:
        anchor_generator: makes the anchors from the feature maps.
        anchor_matcher: labels anchors by their IoU with the ground truth.
        smooth_l1_beta, box_reg_loss_type: of the box loss.
        kwargs: of :class:`AnchorDetector`.
    """

    @configurable
    def __init__(self, *, anchor_generator, anchor_matcher, smooth_l1_beta=0.0, box_reg_loss_type="smooth_l1",
                 test_score_thresh=0.05, test_nms_thresh=0.5, **kwargs):
        super().__init__(test_score_thresh=test_score_thresh, test_nms_thresh=test_nms_thresh, **kwargs)
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type

    @classmethod
    def from_config(cls, cfg):
        retinanet = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        shapes = [shapes[name] for name in retinanet.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": RetinaNetHead(cfg, shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(
                retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, allow_low_quality_matches=True),
            "num_classes": retinanet.NUM_CLASSES,
            "focal_loss_alpha": retinanet.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": retinanet.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": retinanet.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": retinanet.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """Focal loss over labelled anchors and box loss over positive ones, both over ``loss_normalizer``.

        Args:
            anchors: per level, R_l boxes; R below is their sum.
            pred_logits, pred_anchor_deltas: per level, (N, R_l, K) and (N, R_l, 4).
            gt_labels, gt_boxes: per image, see :meth:`label_anchors`.
        """
        labels = torch.stack(gt_labels)
        valid = labels >= 0
        positive = valid & (labels != self.num_classes)
        normalizer = self._update_normalizer(positive, initial=100)
        loss_box_reg = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, positive,
            box_reg_loss_type=self.box_reg_loss_type, smooth_l1_beta=self.smooth_l1_beta)
        return {
            "loss_cls": self._focal_loss(cat(pred_logits, dim=1)[valid], labels[valid]) / normalizer,
            "loss_box_reg": loss_box_reg / normalizer,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label every anchor of every image.

        Returns:
            per image: (R,) labels, -1 ignore, 0..K-1 class, K background; (R, 4) the best matching boxes
            (all zero without ground truth).
        """
        anchors = Boxes.cat(anchors)
        gt_labels, gt_boxes = [], []
        for instances in gt_instances:
            matches, anchor_labels = self.anchor_matcher(pairwise_iou(instances.gt_boxes, anchors))
            if len(instances) > 0:
                labels = instances.gt_classes[matches]
                labels[anchor_labels == 0] = self.num_classes
                labels[anchor_labels == -1] = -1
                boxes = instances.gt_boxes.tensor[matches]
            else:
                labels = torch.full_like(matches, self.num_classes)
                boxes = torch.zeros_like(anchors.tensor)
            gt_labels.append(labels)
            gt_boxes.append(boxes)
        return gt_labels, gt_boxes

    @staticmethod
    def _scores(logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()


class RetinaNetHead(nn.Module):
    """Two towers of convolutions shared by all levels, for classes and for boxes.

    Args:
        input_shape: of each level; all have the same channels.
        num_anchors: per pixel.
        conv_dims: output channels of each tower's convolutions.
        norm: of the towers; ``BN`` and ``SyncBN`` keep statistics for each level.
        prior_prob: initial foreground probability (arXiv:1708.02002, section 4.1).
    """

    @configurable
    def __init__(self, *, input_shape: list[ShapeSpec], num_classes, num_anchors, conv_dims: list[int],
                 norm="", prior_prob=0.01):
        super().__init__()
        if norm in ("BN", "SyncBN"):
            bn_class = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
            norm = partial(CycleBatchNormList, len(input_shape), bn_class)
        towers = {"cls": [], "bbox": []}
        channels = input_shape[0].channels
        for out_channels in conv_dims:
            for layers in towers.values():
                layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))
                if norm:
                    layers.append(get_norm(norm, out_channels))
                layers.append(nn.ReLU())
            channels = out_channels
        self.cls_subnet = nn.Sequential(*towers["cls"])
        self.bbox_subnet = nn.Sequential(*towers["bbox"])
        self.cls_score = nn.Conv2d(channels, num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * 4, kernel_size=3, padding=1)
        fill_convs(self)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": num_anchors_per_pixel(cfg, input_shape),
            "conv_dims": [input_shape[0].channels] * cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Raw class logits (N, A * K, H_l, W_l) and box deltas (N, A * 4, H_l, W_l) of each level."""
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        deltas = [self.bbox_pred(self.bbox_subnet(x)) for x in features]
        return logits, deltas

"""FCOS and FCOSHead."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec, cat
from detectron2.structures import Boxes, Instances, pairwise_point_box_distance
from torch import nn

from ..anchor_generator import DefaultAnchorGenerator
from ..box_regression import Box2BoxTransformLinear, _dense_box_regression_loss
from ..dense_head import fill_convs
from .dense_detector import AnchorDetector
from .retinanet import RetinaNetHead


class FCOS(AnchorDetector):
    """FCOS (Tian et al., arXiv:1904.01355), an anchor being the square that a feature pixel covers.

    There is no config for it: construct it.

    Args:
        center_sampling_radius: positives lie within so many strides of the box centre (in both axes).
        kwargs: of :class:`AnchorDetector`, but for ``box2box_transform``.
    """

    def __init__(self, *, backbone, center_sampling_radius=1.5, test_score_thresh=0.2, test_nms_thresh=0.6,
                 **kwargs):
        super().__init__(
            backbone=backbone, box2box_transform=Box2BoxTransformLinear(),
            test_score_thresh=test_score_thresh, test_nms_thresh=test_nms_thresh, **kwargs)
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.5)
        self.center_sampling_radius = center_sampling_radius

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness):
        """Focal loss of all pixels, GIoU and centerness losses of positive ones, over ``loss_normalizer``.

        Args:
            anchors: per level, R_l boxes; R below is their sum.
            pred_logits, pred_anchor_deltas, pred_centerness: per level, (N, R_l, K or 4 or 1).
            gt_labels, gt_boxes: per image, see :meth:`label_anchors`.
        """
        labels = torch.stack(gt_labels)
        positive = labels != self.num_classes
        normalizer = self._update_normalizer(positive, initial=300)
        loss_loc = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, positive, box_reg_loss_type="giou")
        centerness = cat(pred_centerness, dim=1).squeeze(-1)
        loss_ctr = F.binary_cross_entropy_with_logits(
            centerness[positive], self.compute_ctrness_targets(anchors, gt_boxes)[positive], reduction="sum")
        return {
            "loss_fcos_cls": self._focal_loss(cat(pred_logits, dim=1), labels) / normalizer,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        }

    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> torch.Tensor:
        """(R,) index of the ground truth that each pixel belongs to, -1 for background (section 3.2, 3.3)."""
        squares = Boxes.cat(anchors)
        if len(gt_boxes) == 0:
            return torch.full((len(squares),), -1, dtype=torch.int64, device=squares.device)
        centres = squares.get_centers()
        strides = squares.tensor[:, 2] - squares.tensor[:, 0]
        lower, upper = strides * 4, strides * 8
        lower[: len(anchors[0])] = 0
        upper[len(squares) - len(anchors[-1]):] = math.inf

        # all P x M
        offset = (centres[:, None] - gt_boxes.get_centers()[None]).abs().max(dim=2).values
        near = offset < self.center_sampling_radius * strides[:, None]
        distances = pairwise_point_box_distance(centres, gt_boxes)
        inside = distances.min(dim=2).values > 0
        farthest = distances.max(dim=2).values
        fits = (farthest > lower[:, None]) & (farthest < upper[:, None])
        # of several boxes the smallest wins
        area = gt_boxes.area().expand(len(squares), -1).masked_fill(~(near & inside & fits), math.inf)
        smallest, matches = area.min(dim=1)
        return matches.masked_fill(smallest.isinf(), -1)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label every pixel of every image.

        Returns:
            per image: (R,) labels, 0..K-1 class, K background; (R, 4) the boxes of these (zero if none).
        """
        gt_labels, gt_boxes = [], []
        for instances in gt_instances:
            matches = self._match_anchors(instances.gt_boxes, anchors)
            background = matches < 0
            if len(instances) > 0:
                labels = instances.gt_classes[matches].masked_fill(background, self.num_classes)
                boxes = instances.gt_boxes.tensor[matches]
            else:
                labels = torch.full_like(matches, self.num_classes)
                boxes = instances.gt_boxes.tensor.new_zeros((len(matches), 4))
            gt_labels.append(labels)
            gt_boxes.append(boxes)
        return gt_labels, gt_boxes

    @torch.no_grad()
    def compute_ctrness_targets(self, anchors: list[Boxes], gt_boxes: list[torch.Tensor]) -> torch.Tensor:
        """(N, R) centerness (equation 3) of each pixel in its box; meaningless for background."""
        distances = self.box2box_transform.get_deltas(Boxes.cat(anchors).tensor, torch.stack(gt_boxes))
        horizontal, vertical = (
            pair.min(dim=-1).values / pair.max(dim=-1).values
            for pair in (distances[..., 0::2], distances[..., 1::2])
        )
        return torch.sqrt(horizontal * vertical)

    @staticmethod
    def _scores(logits: torch.Tensor, centerness: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(logits.sigmoid() * centerness.sigmoid())


class FCOSHead(RetinaNetHead):
    """RetinaNet's head with one anchor and a centerness prediction on the box tower.

    Args:
        kwargs: the other arguments of :class:`RetinaNetHead`, but for ``num_anchors``.
    """

    def __init__(self, *, input_shape: list[ShapeSpec], conv_dims: list[int], **kwargs):
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.ctrness = nn.Conv2d(conv_dims[-1], 1, kernel_size=3, padding=1)
        fill_convs(self.ctrness)

    def forward(self, features: list[torch.Tensor]):
        """Each level's raw class logits (N, K, H_l, W_l), distances (N, 4, ..) and centerness (N, 1, ..)."""
        logits, deltas, centerness = [], [], []
        for x in features:
            logits.append(self.cls_score(self.cls_subnet(x)))
            box_features = self.bbox_subnet(x)
            deltas.append(self.bbox_pred(box_features))
            centerness.append(self.ctrness(box_features))
        return logits, deltas, centerness

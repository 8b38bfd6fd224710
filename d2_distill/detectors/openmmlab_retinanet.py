"""RetinaNet trained in OpenMMLab's convention, in which CrossKD's and HEAD's numbers were published."""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss_jit

from ..assigners import MaxIoUMatcher, valid_locations
from ..staged import Assignment
from .box_coder import TwoSidedBox2BoxTransform


@META_ARCH_REGISTRY.register()
class OpenMMLabRetinaNet(RetinaNet):
    """Detectron2's RetinaNet (same modules, state-dict names and anchor order) with another training
    convention, chosen by ``MODEL.META_ARCHITECTURE: OpenMMLabRetinaNet``:

    - the losses are divided by this batch's positives (``Assignment.normalizer``), not by a running mean;
    - a box claims its best anchors from other boxes (:class:`MaxIoUMatcher`);
    - anchors of cells that are only batch padding are ignored (:func:`valid_locations`);
    - width and height deltas are clamped on both sides when decoded (:class:`TwoSidedBox2BoxTransform`);
    - the box loss is plain L1 (``MODEL.RETINANET.SMOOTH_L1_LOSS_BETA`` is not read).
    """

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        node = cfg.MODEL.RETINANET
        ret["anchor_matcher"] = MaxIoUMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS)
        ret["box2box_transform"] = TwoSidedBox2BoxTransform(weights=node.BBOX_REG_WEIGHTS)
        ret["smooth_l1_beta"] = 0.0
        return ret

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """
        Args:
            anchors: one Boxes a level, R anchors in all.
            gt_instances: one a training image, with ``gt_boxes`` and ``gt_classes``.

        Returns:
            For each image (R,) classes, ``num_classes`` for background and -1 for ignored anchors, and the
            (R, 4) boxes they were matched with (meaningless, but finite, where there is no class).
        """
        grid_sizes = self._grid_sizes(anchors)
        all_anchors = Boxes.cat(anchors)
        gt_labels, gt_boxes = [], []
        for instances in gt_instances:
            valid = valid_locations(
                instances.image_size, grid_sizes, self.anchor_generator.strides, device=all_anchors.device
            ).repeat_interleave(self.anchor_generator.num_anchors[0])
            quality = pairwise_iou(instances.gt_boxes, all_anchors) * valid
            matches, match_labels = self.anchor_matcher(quality)
            if len(instances):
                labels = instances.gt_classes[matches]
                gt_boxes.append(instances.gt_boxes.tensor[matches])
            else:
                labels = torch.zeros_like(matches)
                gt_boxes.append(all_anchors.tensor)
            labels = labels.masked_fill(match_labels == 0, self.num_classes)
            gt_labels.append(labels.masked_fill((match_labels == -1) | ~valid, -1))
        return gt_labels, gt_boxes

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            anchors: one Boxes a level, R anchors in all.
            pred_logits, pred_anchor_deltas: one (N, Ri, num_classes) and (N, Ri, 4) tensor a level.
            gt_labels, gt_boxes: of :meth:`label_anchors`.

        Returns:
            "loss_cls" (focal loss of all anchors not ignored) and "loss_box_reg" (of the positive anchors).
        """
        assignment = Assignment(torch.stack(gt_labels), torch.stack(gt_boxes), self.num_classes)
        valid, positive = assignment.valid, assignment.foreground
        get_event_storage().put_scalar("num_pos_anchors", positive.sum().item() / len(positive))

        targets = F.one_hot(assignment.labels[valid], self.num_classes + 1)[:, :-1]
        logits = torch.cat(pred_logits, dim=1)[valid]
        loss_cls = sigmoid_focal_loss_jit(
            logits,
            targets.to(logits.dtype),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        loss_box_reg = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            positive,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        normalizer = assignment.normalizer
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box_reg / normalizer}

    def _grid_sizes(self, anchors: List[Boxes]) -> List[Tuple[int, int]]:
        """(H, W) of each level's feature map, read off the distance of its first and last cell."""
        generator = self.anchor_generator
        spans = [
            (boxes.tensor[-1] - boxes.tensor[number - 1])[:2] / stride
            for boxes, number, stride in zip(anchors, generator.num_anchors, generator.strides)
        ]
        return [(rows + 1, columns + 1) for columns, rows in torch.stack(spans).round().int().tolist()]

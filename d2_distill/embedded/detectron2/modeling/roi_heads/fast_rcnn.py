"""The box predictor of Fast R-CNN: scores and class-wise boxes, their losses, and the final detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms, cat, cross_entropy
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..box_regression import Box2BoxTransform, _dense_box_regression_loss

Predictions = tuple[Tensor, Tensor]  # class logits and box deltas of all regions of a batch


def fast_rcnn_inference(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], image_shapes: list[tuple[int, int]],
    score_thresh: float, nms_thresh: float, topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Detections of every image after thresholding, class-wise suppression and the limit on their number.

    Args:
        boxes: per image, (R, 4K), or (R, 4) where the box does not depend on the class.
        scores: per image, (R, K + 1) with the background last.
        image_shapes: (height, width) of every image; boxes are clipped to it.
        score_thresh: scores must be strictly greater.
        topk_per_image: negative for no limit.

    Returns:
        per image, Instances with ``pred_boxes``, ``scores``, ``pred_classes`` by descending score, and the
        rows (among those that are finite) that the detections come from.
    """
    results = [
        _detections_of_image(*image, score_thresh, nms_thresh, topk_per_image)
        for image in zip(boxes, scores, image_shapes)
    ]
    return [instances for instances, _ in results], [rows for _, rows in results]


def _detections_of_image(
    boxes: Tensor, scores: Tensor, image_shape: tuple[int, int],
    score_thresh: float, nms_thresh: float, topk_per_image: int,
) -> tuple[Instances, Tensor]:
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    boxes, scores = boxes[finite], scores[finite][:, :-1]
    num_box_columns = boxes.shape[1] // 4
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_shape)
    boxes = clipped.tensor.view(-1, num_box_columns, 4)

    rows, classes = torch.nonzero(scores > score_thresh, as_tuple=True)
    boxes = boxes[rows, 0 if num_box_columns == 1 else classes]
    scores = scores[rows, classes]
    keep = batched_nms(boxes, scores, classes, nms_thresh)
    if topk_per_image >= 0:
        keep = keep[:topk_per_image]
    detections = Instances(
        image_shape, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=classes[keep])
    return detections, rows[keep]


def _log_classification_stats(pred_logits: Tensor, gt_classes: Tensor) -> None:
    """Puts the accuracy, that of the foreground, and the share of missed foreground into the storage."""
    if len(gt_classes) == 0:
        return
    background = pred_logits.shape[1] - 1
    predicted = pred_logits.argmax(dim=1)
    correct = predicted == gt_classes
    foreground = gt_classes < background
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", correct.float().mean().item())
    if foreground.any():
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", correct[foreground].float().mean().item())
        missed = (predicted[foreground] == background).float().mean().item()
        storage.put_scalar("fast_rcnn/false_negative", missed)


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers: scores of K classes and background, and box deltas (4K, or 4 if class-agnostic)."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, box2box_transform: Box2BoxTransform, num_classes: int,
        test_score_thresh: float, test_nms_thresh: float, test_topk_per_image: int,
        cls_agnostic_bbox_reg: bool, box_reg_loss_type: str, smooth_l1_beta: float,
        loss_weight: dict[str, float],
    ):
        """
        Args:
            input_shape: of the box head's output.
            loss_weight: a factor by name of the loss.
        """
        super().__init__()
        in_features = input_shape.channels * (input_shape.height or 1) * (input_shape.width or 1)
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if cls_agnostic_bbox_reg else num_classes))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "box2box_transform": Box2BoxTransform(weights=head.BBOX_REG_WEIGHTS),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "test_score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "test_nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
            "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": head.SMOOTH_L1_BETA,
            "loss_weight": {"loss_cls": 1.0, "loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
        }

    def forward(self, x: Tensor) -> Predictions:
        """Scores (R, K + 1), background last, and deltas (R, 4K or 4) from features (R, C, ...)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``.

        Args:
            proposals: with ``proposal_boxes``, ``gt_classes`` (K: background); foreground has ``gt_boxes``.
        """
        scores, deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals], dim=0)
        _log_classification_stats(scores, gt_classes)
        # Without ground truth there is no foreground: any box will do.
        gt_boxes = Boxes.cat([p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals])
        proposal_boxes = Boxes.cat([p.proposal_boxes for p in proposals])
        losses = {
            "loss_cls": cross_entropy(scores, gt_classes),
            "loss_box_reg": self.box_reg_loss(proposal_boxes, gt_boxes, deltas, gt_classes),
        }
        return {name: loss * self.loss_weight[name] for name, loss in losses.items()}

    def box_reg_loss(
        self, proposal_boxes: Boxes, gt_boxes: Boxes, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Sum over the foreground divided by the number of all sampled regions."""
        foreground = torch.nonzero(gt_classes < self.num_classes).squeeze(1)
        deltas = pred_deltas[foreground].unflatten(1, (-1, 4))
        columns = 0 if deltas.shape[1] == 1 else gt_classes[foreground]
        deltas = deltas[torch.arange(len(foreground), device=deltas.device), columns]
        loss = _dense_box_regression_loss(
            [proposal_boxes[foreground]], self.box2box_transform, [deltas.unsqueeze(0)],
            [gt_boxes.tensor[foreground]], torch.ones_like(foreground, dtype=torch.bool).unsqueeze(0),
            self.box_reg_loss_type, self.smooth_l1_beta)
        return loss / max(gt_classes.numel(), 1)

    def inference(
        self, predictions: Predictions, proposals: list[Instances],
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections of every image, see :func:`fast_rcnn_inference`."""
        return fast_rcnn_inference(
            self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image)

    def predict_boxes(self, predictions: Predictions, proposals: list[Instances]) -> Sequence[Tensor]:
        """Per image, boxes (R, 4K or 4) of the regions, not clipped."""
        sources = Boxes.cat([p.proposal_boxes for p in proposals]).tensor
        boxes = self.box2box_transform.apply_deltas(predictions[1], sources)
        return boxes.split([len(p) for p in proposals])

    def predict_probs(self, predictions: Predictions, proposals: list[Instances]) -> Sequence[Tensor]:
        """Per image, probabilities (R, K + 1) of the classes and the background."""
        return predictions[0].softmax(dim=-1).split([len(p) for p in proposals])

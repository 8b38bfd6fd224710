"""DenseDetector, the base of one-stage detectors, and what those with anchors and a focal loss share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor, nn

from ..backbone import Backbone
from ..dense_head import permute_to_N_HWA_K
from ..postprocessing import detector_postprocess


class DenseDetector(nn.Module):
    """Backbone, a head on its feature maps, and what subclasses make of the head's output.

    Subclasses implement ``forward_training(images, features, predictions, gt_instances)``, which returns a
    dict of losses, and ``forward_inference(images, features, predictions)``, which returns each image's
    Instances in coordinates of the network's input.

    Args:
        head: takes the list of feature maps; returns lists with one dense prediction for each of them.
        head_in_features: names of the backbone's outputs to use; by default all, from fine to coarse.
        pixel_mean, pixel_std: of each channel of the image.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, head_in_features: list[str] | None = None, *,
                 pixel_mean, pixel_std):
        super().__init__()
        self.backbone = backbone
        self.head = head
        shapes = backbone.output_shape()
        self.head_in_features = list(head_in_features or sorted(shapes, key=lambda name: shapes[name].stride))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Losses in training, detections otherwise.

        Args:
            batched_inputs: one dict per image: ``image`` (C, H, W); ``instances`` (gt_boxes, gt_classes) for
                training; optional ``height``, ``width`` that detections are scaled to.

        Returns:
            dict of scalar losses, or a list of ``{"instances": Instances(pred_boxes, scores, ...)}``.
        """
        images = self.preprocess_image(batched_inputs)
        feature_maps = self.backbone(images.tensor)
        features = [feature_maps[name] for name in self.head_in_features]
        predictions = self.head(features)
        if self.training:
            assert "instances" in batched_inputs[0], "training needs ground truth: 'instances' is missing"
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.forward_training(images, features, predictions, gt_instances)

        detections = self.forward_inference(images, features, predictions)
        outputs = []
        for result, x, (height, width) in zip(detections, batched_inputs, images.image_sizes):
            result = detector_postprocess(result, x.get("height", height), x.get("width", width))
            outputs.append({"instances": result})
        return outputs

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, then pad them with 0 to one batch."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def _transpose_dense_predictions(
        self, predictions: list[list[Tensor]], dims_per_anchor: list[int]
    ) -> list[list[Tensor]]:
        """Each list of (N, A * K, H, W) as (N, H * W * A, K), K given for each list."""
        return [[permute_to_N_HWA_K(x, K) for x in levels] for levels, K in zip(predictions, dims_per_anchor)]


class AnchorDetector(DenseDetector):
    """Classifies anchors and regresses boxes from them, with a focal loss.

    Losses are divided by a running mean of the number of positive anchors in the batch, ``loss_normalizer``,
    which belongs to the process and is not saved.

    Subclasses set ``anchor_generator`` and implement ``label_anchors(anchors, gt_instances)``,
    ``losses(anchors, logits, labels, deltas, boxes, ...)`` and ``_scores(logits, ...)``, the dots being the
    head's third output if it has one.

    Args:
        box2box_transform: codes boxes relative to anchors.
        focal_loss_alpha, focal_loss_gamma: of the class loss.
        test_score_thresh, test_topk_candidates: which (anchor, class) pairs of a level are decoded.
        test_nms_thresh, max_detections_per_image: which of them are returned.
        kwargs: of :class:`DenseDetector`.
    """

    def __init__(self, *, box2box_transform, num_classes, focal_loss_alpha=0.25, focal_loss_gamma=2.0,
                 test_score_thresh, test_topk_candidates=1000, test_nms_thresh, max_detections_per_image=100,
                 **kwargs):
        super().__init__(**kwargs)
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def _anchors_and_predictions(self, features, predictions):
        dims_per_anchor = [self.num_classes, 4, 1][: len(predictions)]
        predictions = self._transpose_dense_predictions(predictions, dims_per_anchor)
        return (self.anchor_generator(features), *predictions)

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, Tensor]:
        anchors, logits, deltas, *others = self._anchors_and_predictions(features, predictions)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes, *others)

    def _focal_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over logits (..., K) of anchors with labels (...): a class, or K for background."""
        targets = F.one_hot(labels, self.num_classes + 1)[..., :-1].to(logits.dtype)
        return sigmoid_focal_loss_jit(
            logits, targets, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma, reduction="sum")

    def _update_normalizer(self, positive: Tensor, initial: float) -> float:
        """Take the (N, R) positive anchors of a batch into the running mean."""
        num_positive = positive.sum().item()
        get_event_storage().put_scalar("num_pos_anchors", num_positive / len(positive))
        self.loss_normalizer = 0.9 * getattr(self, "loss_normalizer", initial) + 0.1 * max(num_positive, 1)
        return self.loss_normalizer

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        anchors, logits, deltas, *others = self._anchors_and_predictions(features, predictions)
        scores = [self._scores(*level) for level in zip(logits, *others)]
        return [
            self.inference_single_image(anchors, [x[i] for x in scores], [x[i] for x in deltas], image_size)
            for i, image_size in enumerate(images.image_sizes)
        ]

    def inference_single_image(
        self, anchors: list[Boxes], scores: list[Tensor], deltas: list[Tensor], image_size: tuple[int, int],
    ) -> Instances:
        """Detections of one image from per-level (R_l, K) scores and (R_l, 4) deltas, best first."""
        candidates = Instances.cat([
            self._best_of_level(*level, image_size) for level in zip(anchors, scores, deltas)])
        keep = batched_nms(
            candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes, self.test_nms_thresh)
        return candidates[keep[: self.max_detections_per_image]]

    def _best_of_level(
        self, anchors: Boxes, scores: Tensor, deltas: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """The (anchor, class) pairs of highest score, of those above the threshold."""
        rows, classes = (scores > self.test_score_thresh).nonzero(as_tuple=True)
        best_scores, best = scores[rows, classes].topk(min(len(rows), self.test_topk_candidates))
        rows = rows[best]
        boxes = self.box2box_transform.apply_deltas(deltas[rows], anchors.tensor[rows])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=best_scores, pred_classes=classes[best])

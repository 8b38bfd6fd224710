"""What the project's one-stage detectors share: anchors, positives, inference, and their stages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..assigners import Assignment, ATSSAssigner, GroundTruth, MaxIoUAssigner, PointAssigner, valid_locations
from ..boxes.geometry import centers_of, distances_to_sides
from ..errors import UserError
from ..losses import BOX_LOSSES
from ..staged import StagedDense, Tower
from .box_coders import DistributionCoder

# Output name -> per level (N, R_l, K), or all levels of one image or batch (..., R, K).
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Positives:
    """The M positive anchors of a batch; lengths are in units of each anchor's stride.

    Attributes:
        rows: (image, anchor) indices, (M,) each.
        anchors, boxes, targets: (M, 4) XYXY; boxes are the predicted, targets the ground-truth ones.
        deltas: (M, box_dim) raw box outputs.
    """

    rows: tuple[torch.Tensor, torch.Tensor]
    anchors: torch.Tensor
    boxes: torch.Tensor
    targets: torch.Tensor
    deltas: torch.Tensor

    @property
    def distances(self) -> torch.Tensor:
        """(M, 4) from the anchors' centres to the sides of the targets."""
        return distances_to_sides(centers_of(self.anchors), self.targets)


class TowerDetector(DenseDetector):
    """Base of GFL, ATSS, OpenMMLabFCOS and OpenMMLabRetinaNet.

    Subclasses implement ``losses``. The convention is OpenMMLab's: losses are divided by the
    batch's own positives, and inference keeps the best locations of a level with all their classes.

    Args:
        head: a :class:`~d2_distill.detectors.head.TowerHead`.
        anchor_generator: anchors of the levels.
        assigner: gives each anchor its ground truth, see :mod:`d2_distill.assigners`.
        box_coder: one of :mod:`~d2_distill.detectors.box_coders`.
        num_classes: of the foreground.
        box_loss: element-wise loss of paired boxes, see :func:`build_box_loss`.
        box_loss_weight: factor on it.
        test_score_thresh: class scores above it are kept.
        test_topk_candidates: locations of a level that are kept.
        test_nms_thresh: IoU of the non-maximum suppression.
        max_detections_per_image: after it.
        kwargs: of DenseDetector.
    """

    # Whether anchors of cells that are only batch padding are left out of the assignment.
    ignores_padding = True

    def __init__(
        self,
        *,
        head: nn.Module,
        anchor_generator: nn.Module,
        assigner: Callable,
        box_coder,
        num_classes: int,
        box_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        box_loss_weight: float,
        test_score_thresh: float,
        test_topk_candidates: int,
        test_nms_thresh: float,
        max_detections_per_image: int,
        **kwargs,
    ) -> None:
        super().__init__(head=head, **kwargs)
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.box_coder = box_coder
        self.num_classes = num_classes
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @property
    def strides(self) -> Sequence[int]:
        """Of the levels, in pixels."""
        return self.anchor_generator.strides

    @torch.no_grad()
    def assign(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Assignment:
        """Targets of the batch; ``anchors`` are one Boxes a level, ``gt_instances`` one a training image."""
        truth = GroundTruth.from_instances(gt_instances)
        valid = self.valid_anchors(anchors, gt_instances)
        matches = self.assigner(
            Boxes.cat(anchors).tensor, [len(boxes) for boxes in anchors], self.strides, truth, valid
        )
        return truth.assignment(matches, self.num_classes, valid)

    def losses(
        self, anchors: list[Boxes], outputs: dict[str, list[torch.Tensor]], assignment: Assignment
    ) -> dict[str, torch.Tensor]:
        """Scalar losses by name; ``outputs`` are (N, R_l, K), one a level."""
        raise NotImplementedError

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        """Class probabilities (..., num_scores) from outputs (..., K)."""
        return outputs["logits"].sigmoid()

    def final_scores(self, scores: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """What detections are ranked by, of the shape of the class scores."""
        return scores * outputs["centerness"].sigmoid() if "centerness" in outputs else scores

    def strides_of(self, anchors: list[Boxes]) -> torch.Tensor:
        """(R,) stride of each anchor."""
        return torch.cat([
            boxes.tensor.new_full((len(boxes),), stride) for boxes, stride in zip(anchors, self.strides)
        ])

    def valid_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> torch.Tensor | None:
        """(N, R) bool: anchors whose cells belong to the image, and not only to the padding of its batch."""
        if not self.ignores_padding:
            return None
        grid_sizes = self._grid_sizes(anchors)
        per_cell = self.anchor_generator.num_anchors[0]
        masks = [
            valid_locations(x.image_size, grid_sizes, self.strides, device=anchors[0].device)
            for x in gt_instances
        ]
        return torch.stack(masks).repeat_interleave(per_cell, dim=1)

    def _grid_sizes(self, anchors: list[Boxes]) -> list[tuple[int, int]]:
        """(H, W) of each level's feature map, read off the distance of its first and last cell."""
        spans = [
            (boxes.tensor[-1] - boxes.tensor[number - 1])[:2] / stride
            for boxes, number, stride in zip(anchors, self.anchor_generator.num_anchors, self.strides)
        ]
        return [(rows + 1, columns + 1) for columns, rows in torch.stack(spans).round().int().tolist()]

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        anchors = self.anchor_generator(features)
        return self.losses(anchors, self._flatten(predictions), self.assign(anchors, gt_instances))

    def _flatten(self, predictions: list[list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        per_cell = self.anchor_generator.num_anchors[0]
        dims = [levels[0].shape[1] // per_cell for levels in predictions]
        return dict(zip(self.head.predictors, self._transpose_dense_predictions(predictions, dims)))

    def positives(self, anchors: list[Boxes], deltas: torch.Tensor, assignment: Assignment) -> Positives:
        """Gather the positive anchors; ``deltas`` are (N, R, box_dim)."""
        rows = assignment.foreground.nonzero(as_tuple=True)
        get_event_storage().put_scalar("num_pos_anchors", len(rows[0]) / len(deltas))
        of_rows, strides = Boxes.cat(anchors).tensor[rows[1]], self.strides_of(anchors)[rows[1]]
        deltas = deltas[rows]
        boxes = self.box_coder.decode(deltas, of_rows, strides)
        return Positives(
            rows=rows,
            anchors=of_rows / strides[:, None],
            boxes=boxes / strides[:, None],
            targets=assignment.boxes[rows] / strides[:, None],
            deltas=deltas,
        )

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        anchors = self.anchor_generator(features)
        outputs = self._flatten(predictions)
        return [
            self._inference_single_image(
                anchors, {name: [x[index] for x in levels] for name, levels in outputs.items()}, image_size
            )
            for index, image_size in enumerate(images.image_sizes)
        ]

    def _inference_single_image(
        self, anchors: list[Boxes], outputs: dict[str, list[torch.Tensor]], image_size: tuple[int, int]
    ) -> Instances:
        candidates = []
        for level, (boxes, stride) in enumerate(zip(anchors, self.strides)):
            of_level = {name: levels[level] for name, levels in outputs.items()}
            candidates.append(self._candidates(boxes.tensor, stride, of_level, image_size))
        return self._suppress(Instances.cat(candidates))

    def _suppress(self, candidates: Instances) -> Instances:
        """The detections of an image, best first, from the candidates of all levels."""
        keep = batched_nms(
            candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes, self.test_nms_thresh
        )
        return candidates[keep[: self.max_detections_per_image]]

    def _candidates(
        self, anchors: torch.Tensor, stride: int, outputs: Outputs, image_size: tuple[int, int]
    ) -> Instances:
        """Detections of a level before the non-maximum suppression, from outputs (R_l, K)."""
        scores = self.class_scores(outputs)[:, : self.num_classes]
        ranked = self.final_scores(scores, outputs)
        best = ranked.amax(dim=1).topk(min(len(ranked), self.test_topk_candidates)).indices
        # The threshold is on the class score alone.
        rows, classes = (scores[best] > self.test_score_thresh).nonzero(as_tuple=True)
        rows = best[rows]
        strides = anchors.new_full((len(rows),), stride)
        boxes = Boxes(self.box_coder.decode(outputs["deltas"][rows], anchors[rows], strides))
        boxes.clip(image_size)
        return Instances(image_size, pred_boxes=boxes, scores=ranked[rows, classes], pred_classes=classes)


class StagedTowerDetector(StagedDense):
    """The project's own one-stage detectors."""

    def __init__(self, model: TowerDetector) -> None:
        super().__init__(model)
        head = model.head
        self.towers = {"cls": Tower(head.cls_subnet), "box": Tower(head.bbox_subnet)}
        self.predictors = head.predictors
        if isinstance(model.box_coder, DistributionCoder):
            self.reg_max = model.box_coder.reg_max
        self.assigns_points = isinstance(model.assigner, PointAssigner)
        self.averages_normalizer = not isinstance(model.assigner, MaxIoUAssigner)
        if isinstance(model.assigner, ATSSAssigner):
            self.atss_topk = model.assigner.topk

    def predict(self, output: str, feature: torch.Tensor, level: int) -> torch.Tensor:
        return self.model.head.predict(output, feature, level)

    def assign(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Assignment:
        return self.model.assign(anchors, gt_instances)

    def valid_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> torch.Tensor | None:
        return self.model.valid_anchors(anchors, gt_instances)

    def losses(self, anchors, outputs, assignment) -> dict[str, torch.Tensor]:
        return self.model.losses(anchors, outputs, assignment)

    def decode_rows(self, deltas, anchors, strides) -> torch.Tensor:
        return self.model.box_coder.decode(deltas, anchors, strides)

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        return self.model.class_scores(outputs)


def concatenate_levels(outputs: dict[str, list[torch.Tensor]]) -> Outputs:
    """Outputs (N, R, K) of all levels, in float32: losses are not taken in half precision."""
    return {name: torch.cat(levels, dim=1).float() for name, levels in outputs.items()}


def square_anchors(input_shape: list[ShapeSpec], scale: float, offset: float) -> DefaultAnchorGenerator:
    """One square of ``scale`` strides a cell.

    Args:
        offset: of its centre from the cell's corner, in strides.
    """
    strides = [shape.stride for shape in input_shape]
    return DefaultAnchorGenerator(
        sizes=[[scale * stride] for stride in strides], aspect_ratios=[[1.0]], strides=strides, offset=offset
    )


def common_arguments(cfg, family: str) -> tuple[dict[str, Any], list[ShapeSpec]]:
    """The head's input, and constructor arguments that all one-stage detectors read alike.

    Args:
        family: their node below MODEL, such as "GFL".

    Returns:
        Arguments by name, and the shapes of IN_FEATURES.

    Raises:
        UserError: the backbone lacks one of IN_FEATURES.
    """
    node, backbone = cfg.MODEL[family], build_backbone(cfg)
    shapes = backbone.output_shape()
    for name in node.IN_FEATURES:
        if name not in shapes:
            raise UserError(
                f"MODEL.{family}.IN_FEATURES has {name!r}, which the backbone {cfg.MODEL.BACKBONE.NAME} "
                f"lacks; choose from {', '.join(shapes)}."
            )
    arguments = {
        "backbone": backbone,
        "head_in_features": node.IN_FEATURES,
        "num_classes": node.NUM_CLASSES,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }
    return arguments, [shapes[name] for name in node.IN_FEATURES]


def head_arguments(node, input_shape: list[ShapeSpec]) -> dict[str, Any]:
    """Arguments of a head that all one-stage detectors read alike from their node."""
    return {
        "input_shape": input_shape,
        "conv_dims": [input_shape[0].channels] * node.NUM_CONVS,
        "norm": node.NORM,
        "prior_prob": node.PRIOR_PROB,
    }


def build_box_loss(name: str, key: str, **options) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The box loss that a config names, with its options bound.

    Raises:
        UserError: there is no such loss.
    """
    if name not in BOX_LOSSES:
        raise UserError(f"{key} is {name!r}; choose from {', '.join(BOX_LOSSES)}.")
    return functools.partial(BOX_LOSSES[name], **options)

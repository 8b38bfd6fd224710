"""What the project's dense detectors share: anchors, positives, inference, and their stages."""

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

from ..assigners import Assigner, Assignment, GroundTruth, Predicted
from ..boxes.anchor_grid import AnchorGrid
from ..boxes.geometry import centers_of, distances_to_sides
from ..errors import UserError
from ..losses import BOX_LOSSES, mean_over_processes
from ..staged import StagedDense, register_staged, stage_detector
from .criteria import BoxLoss, Outputs


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
    """A dense detector put together from a head, anchors, an assigner, a box coder and a criterion.

    Subclasses name their config node and build the parts from it. The convention is OpenMMLab's: losses are divided by
    the batch's own positives, and inference keeps the best locations of a level with all their classes.

    Args:
        head: a :class:`~d2_distill.detectors.head.DenseHead`.
        anchor_generator: anchors of the levels.
        assigner: gives each anchor its ground truth, see :mod:`d2_distill.assigners`.
        box_coder: one of :mod:`~d2_distill.detectors.box_coders`.
        criterion: the losses, one of :mod:`~d2_distill.detectors.criteria`.
        num_classes: number of foreground classes.
        test_score_thresh: class scores above it are kept.
        test_topk_candidates: locations of a level that are kept.
        test_nms_thresh: IoU of the non-maximum suppression.
        max_detections_per_image: after it.
        kwargs: of DenseDetector.
    """

    # Name of its node below MODEL.
    config_node: str
    # Whether anchors of cells that are only batch padding are left out of the assignment.
    ignores_padding = True

    def __init__(
        self,
        *,
        head: nn.Module,
        anchor_generator: nn.Module,
        assigner: Assigner,
        box_coder: Any,
        criterion: Callable[..., dict[str, torch.Tensor]],
        num_classes: int,
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
        self.criterion = criterion
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def grid(self, features: Sequence[torch.Tensor], images: ImageList) -> AnchorGrid:
        """Lay anchors over feature maps (N, C, H, W), one a level."""
        generator = self.anchor_generator
        image_sizes = images.image_sizes if self.ignores_padding else None
        anchors = generator(list(features))
        return AnchorGrid.from_levels(anchors, features, generator.strides, generator.num_anchors[0], image_sizes)

    @torch.no_grad()
    def assign(self, grid: AnchorGrid, truth: GroundTruth, outputs: Outputs) -> Assignment:
        """Return the targets of the batch; ``outputs`` are (N, R, K)."""
        predicted = Predicted(
            scores=lambda: self.class_scores(outputs)[..., : self.num_classes].float(),
            boxes=lambda: self.box_coder.decode(outputs["deltas"], grid.boxes, grid.stride),
        )
        return truth.assignment(self.assigner(grid, truth, predicted), self.num_classes, grid.valid)

    def losses(self, grid: AnchorGrid, outputs: Outputs, assignment: Assignment) -> dict[str, torch.Tensor]:
        """Return scalar losses by name; ``outputs`` are (N, R, K)."""
        # Losses are not taken in half precision.
        outputs = {name: output.float() for name, output in outputs.items()}
        return self.criterion(self, grid, outputs, assignment)

    def normalizer(self, grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
        """Return the number that the class loss is divided by, averaged over the processes."""
        return mean_over_processes(assignment.normalizer)

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        """Class probabilities (..., num_scores) from outputs (..., K)."""
        return outputs["logits"].sigmoid()

    def final_scores(self, scores: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """What detections are ranked by, of the shape of the class scores."""
        return scores * outputs["centerness"].sigmoid() if "centerness" in outputs else scores

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        run = stage_detector(self).run(images, gt_instances)
        # A stage that is set is not computed.
        run.features = dict(zip(self.head_in_features, features))
        run.predictions = dict(zip(self.head.predictors, predictions))
        return run.losses

    def positives(self, grid: AnchorGrid, deltas: torch.Tensor, assignment: Assignment) -> Positives:
        """Gather the positive anchors; ``deltas`` are (N, R, box_dim)."""
        rows = assignment.positives
        get_event_storage().put_scalar("num_pos_anchors", len(rows[0]) / len(deltas))
        anchors, strides = grid.boxes[rows[1]], grid.stride[rows[1]]
        deltas = deltas[rows]
        boxes = self.box_coder.decode(deltas, anchors, strides)
        return Positives(
            rows=rows,
            anchors=anchors / strides[:, None],
            boxes=boxes / strides[:, None],
            targets=assignment.boxes[rows] / strides[:, None],
            deltas=deltas,
        )

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        grid = self.grid(features, images)
        outputs = {name: [grid.flatten(x) for x in maps] for name, maps in zip(self.head.predictors, predictions)}
        return [
            self._inference_single_image(
                grid, {name: [x[index] for x in levels] for name, levels in outputs.items()}, image_size
            )
            for index, image_size in enumerate(images.image_sizes)
        ]

    def _inference_single_image(
        self, grid: AnchorGrid, outputs: dict[str, list[torch.Tensor]], image_size: tuple[int, int]
    ) -> Instances:
        candidates = []
        for level, (boxes, stride) in enumerate(zip(grid.level_boxes(), grid.strides)):
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


@register_staged(TowerDetector)
class StagedTowerDetector(StagedDense):
    """The project's own dense detectors."""

    def __init__(self, model: TowerDetector) -> None:
        super().__init__(model)
        self.towers = model.head.towers
        self.predictors = model.head.predictors
        self.reg_max = model.box_coder.reg_max
        self.assigns_points = model.assigner.assigns_points
        self.assigns_by_outputs = model.assigner.reads_predictions

    @classmethod
    def num_classes_key(cls, model_class: type[TowerDetector], cfg: Any) -> str:
        return f"MODEL.{model_class.config_node}.NUM_CLASSES"

    def predict(self, output, features, level) -> torch.Tensor:
        return self.model.head.predict(output, features, level)

    def grid(self, features, images) -> AnchorGrid:
        return self.model.grid(features, images)

    def assign(self, grid, truth, outputs) -> Assignment:
        return self.model.assign(grid, truth, outputs)

    def losses(self, grid, outputs, assignment) -> dict[str, torch.Tensor]:
        return self.model.losses(grid, outputs, assignment)

    def normalizer(self, grid, assignment) -> torch.Tensor:
        return self.model.normalizer(grid, assignment)

    def decode_rows(self, deltas, anchors, strides) -> torch.Tensor:
        return self.model.box_coder.decode(deltas, anchors, strides)

    def class_scores(self, outputs: Outputs) -> torch.Tensor:
        return self.model.class_scores(outputs)


def square_anchors(input_shape: list[ShapeSpec], scale: float, offset: float) -> DefaultAnchorGenerator:
    """One square of ``scale`` strides a cell.

    Args:
        offset: of its centre from the cell's corner, in strides.
    """
    strides = [shape.stride for shape in input_shape]
    return DefaultAnchorGenerator(
        sizes=[[scale * stride] for stride in strides], aspect_ratios=[[1.0]], strides=strides, offset=offset
    )


def common_arguments(cfg, name: str) -> tuple[dict[str, Any], list[ShapeSpec]]:
    """The head's input, and constructor arguments that all dense detectors read alike.

    Args:
        name: of their node below MODEL, such as "GFL".

    Returns:
        Arguments by name, and the shapes of IN_FEATURES.

    Raises:
        UserError: the backbone lacks one of IN_FEATURES.
    """
    node, backbone = cfg.MODEL[name], build_backbone(cfg)
    shapes = backbone.output_shape()
    for feature in node.IN_FEATURES:
        if feature not in shapes:
            raise UserError(
                f"MODEL.{name}.IN_FEATURES has {feature!r}, which the backbone {cfg.MODEL.BACKBONE.NAME} "
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
    """Arguments of a head that all dense detectors read alike from their node."""
    return {
        "input_shape": input_shape,
        "conv_dims": [input_shape[0].channels] * node.NUM_CONVS,
        "norm": node.NORM,
        "prior_prob": node.PRIOR_PROB,
    }


def build_box_loss(name: str, key: str, **options) -> BoxLoss:
    """The box loss that a config names, with its options bound.

    Raises:
        UserError: there is no such loss.
    """
    if name not in BOX_LOSSES:
        raise UserError(f"{key} is {name!r}; choose from {', '.join(BOX_LOSSES)}.")
    return functools.partial(BOX_LOSSES[name], **options)

"""FCOS: Detectron2's own, made selectable by config, and one with the options of the published forms."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances

from ..assigners import Assignment, PointAssigner
from ..boxes.anchor_grid import AnchorGrid
from ..config.keys import extend_config
from ..errors import UserError
from .box_coders import DistanceCoder, DistributionCoder
from .criteria import FocalCenterness, Outputs, centerness_normalizer
from .head import TowerHead
from .keys import dense_head_keys
from .tower_detector import TowerDetector, build_box_loss, common_arguments, head_arguments, square_anchors


@extend_config
def add_config(cfg: CfgNode) -> None:
    # Detectron2's FCOS ("FCOS"), for which it has no config, and OpenMMLabFCOS. Of the keys below both read
    # CENTER_SAMPLING_RADIUS and the focal loss, the others are OpenMMLabFCOS's, whose docstring lists the options of
    # each published form.
    node = cfg.MODEL.FCOS = dense_head_keys()
    node.SCORE_THRESH_TEST = 0.2
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # A location is positive within this many strides of a box's center; 0: in the whole box (OpenMMLabFCOS).
    node.CENTER_SAMPLING_RADIUS = 1.5
    # Between the levels: the largest distance to a side, in pixels, that the finer one regresses.
    node.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # "exp": exponentials in pixels; "relu": clamped outputs in strides.
    node.DISTANCES = "relu"
    # Tower on which centerness is predicted, "cls" or "box".
    node.CENTERNESS_ON = "box"
    # Whether the towers' convolutions have a bias.
    node.TOWER_BIAS = False
    node.REG_MAX = 0
    node.BOX_LOSS = "giou"
    node.BOX_LOSS_WEIGHT = 1.0
    # Added to intersection and union, in strides, by "giou", "iou" and "linear_iou".
    node.IOU_OFFSET = 0.0
    # Whether the layers that predict boxes and centerness have a bias; MSAD's have none.
    node.PREDICTOR_BIAS = True
    # "openmmlab": the best locations of a level with all their classes; the score is class score times centerness.
    # "adelaidet": the best pairs of location and class. Boxes are clipped only after the suppression (off if
    # NMS_THRESH_TEST <= 0), the score is the root of that product, and ties with the last detection stay.
    node.INFERENCE = "openmmlab"
    # "adelaidet": compare SCORE_THRESH_TEST with class score times centerness, not with the class score alone.
    node.THRESH_WITH_CTR = False


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al., ICCV 2019), configured by ``MODEL.FCOS``."""

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        arguments, input_shape = common_arguments(cfg, "FCOS")
        return {
            **arguments,
            "head": fcos.FCOSHead(num_classes=node.NUM_CLASSES, **head_arguments(node, input_shape)),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }


@META_ARCH_REGISTRY.register()
class OpenMMLabFCOS(TowerDetector):
    """FCOS with the options of the paper, OpenMMLab and AdelaiDet, configured by ``MODEL.FCOS``.

    The paper's first form (arXiv 1904.01355), which CrossKD uses, is CENTER_SAMPLING_RADIUS 0, DISTANCES
    "exp", CENTERNESS_ON "cls", BOX_LOSS "iou". The improvements of its later releases are
    CENTER_SAMPLING_RADIUS 1.5, DISTANCES "relu", CENTERNESS_ON "box", BOX_LOSS "giou"; AdelaiDet's own also
    has IOU_OFFSET 1, TOWER_BIAS and INFERENCE "adelaidet", and MSAD's, made from it, no PREDICTOR_BIAS. With
    REG_MAX above 0 it predicts distributions, as localisation distillation needs.

    Args:
        inference: "openmmlab" or "adelaidet", see ``MODEL.FCOS.INFERENCE``.
        thresh_with_ctr: "adelaidet" compares the score threshold with class score times centerness.
        kwargs: of :class:`TowerDetector`.
    """

    config_node = "FCOS"
    ignores_padding = False

    @configurable
    def __init__(
        self, *, inference: str = "openmmlab", thresh_with_ctr: bool = False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.inference = inference
        self.thresh_with_ctr = thresh_with_ctr

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        arguments, input_shape = common_arguments(cfg, "FCOS")
        _check(node)
        coder = DistributionCoder(node.REG_MAX) if node.REG_MAX else DistanceCoder(node.DISTANCES)
        offset = {"offset": node.IOU_OFFSET} if node.IOU_OFFSET else {}
        return {
            **arguments,
            "head": TowerHead(
                **head_arguments(node, input_shape),
                num_scores=node.NUM_CLASSES,
                box_dim=coder.box_dim,
                tower_bias=node.TOWER_BIAS or not node.NORM,
                predictor_bias=node.PREDICTOR_BIAS,
                centerness_on=node.CENTERNESS_ON,
            ),
            "anchor_generator": square_anchors(input_shape, scale=1.0, offset=0.5),
            "assigner": PointAssigner(tuple(node.SIZES_OF_INTEREST), node.CENTER_SAMPLING_RADIUS),
            "box_coder": coder,
            "criterion": FocalCenterness(
                focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
                focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
                box_loss=build_box_loss(node.BOX_LOSS, "MODEL.FCOS.BOX_LOSS", **offset),
                box_loss_weight=node.BOX_LOSS_WEIGHT,
                normalizer_floor=1e-6,
                counts_empty_images=False,
            ),
            "inference": node.INFERENCE,
            "thresh_with_ctr": node.THRESH_WITH_CTR,
        }

    def normalizer(self, grid: AnchorGrid, assignment: Assignment) -> torch.Tensor:
        return centerness_normalizer(grid, assignment)

    def _candidates(
        self, anchors: torch.Tensor, stride: int, outputs: Outputs, image_size: tuple[int, int]
    ) -> Instances:
        if self.inference == "openmmlab":
            return super()._candidates(anchors, stride, outputs, image_size)
        class_scores = self.class_scores(outputs)
        product = self.final_scores(class_scores, outputs)
        compared = product if self.thresh_with_ctr else class_scores
        rows, classes = (compared > self.test_score_thresh).nonzero(as_tuple=True)
        scores, best = product[rows, classes].topk(min(len(rows), self.test_topk_candidates))
        rows, classes = rows[best], classes[best]
        strides = anchors.new_full((len(rows),), stride)
        boxes = Boxes(self.box_coder.decode(outputs["deltas"][rows], anchors[rows], strides))
        return Instances(image_size, pred_boxes=boxes, scores=scores.sqrt(), pred_classes=classes)

    def _suppress(self, candidates: Instances) -> Instances:
        if self.inference == "openmmlab":
            return super()._suppress(candidates)
        scores = candidates.scores
        if self.test_nms_thresh > 0:
            boxes = candidates.pred_boxes.tensor
            keep = batched_nms(boxes, scores, candidates.pred_classes, self.test_nms_thresh)
        else:
            keep = scores.argsort(descending=True, stable=True)
        scores = scores[keep]
        lowest = scores[: self.max_detections_per_image][-1:]
        return candidates[keep[scores >= lowest]]


def _check(node) -> None:
    """Reject what the options of ``MODEL.FCOS`` cannot mean."""
    for key, value, choices in (
        ("DISTANCES", node.DISTANCES, ("exp", "relu")),
        ("CENTERNESS_ON", node.CENTERNESS_ON, ("box", "cls")),
        ("INFERENCE", node.INFERENCE, ("openmmlab", "adelaidet")),
    ):
        if value not in choices:
            raise UserError(f"MODEL.FCOS.{key} is {value!r}; choose from {', '.join(choices)}.")
    if node.THRESH_WITH_CTR and node.INFERENCE != "adelaidet":
        raise UserError(
            f"MODEL.FCOS.THRESH_WITH_CTR is True, which MODEL.FCOS.INFERENCE {node.INFERENCE!r} does not "
            "have; set it to False, or INFERENCE to adelaidet."
        )
    if node.IOU_OFFSET and node.BOX_LOSS in ("diou", "ciou"):
        raise UserError(
            f"MODEL.FCOS.IOU_OFFSET is {node.IOU_OFFSET}, which the box loss {node.BOX_LOSS!r} does not "
            "have; set it to 0, or MODEL.FCOS.BOX_LOSS to giou, iou or linear_iou."
        )
    if len(node.SIZES_OF_INTEREST) != len(node.IN_FEATURES) - 1:
        raise UserError(
            f"MODEL.FCOS.SIZES_OF_INTEREST has {len(node.SIZES_OF_INTEREST)} bounds, but the "
            f"{len(node.IN_FEATURES)} levels of MODEL.FCOS.IN_FEATURES need {len(node.IN_FEATURES) - 1}; "
            "give one between each two levels."
        )

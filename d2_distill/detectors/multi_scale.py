"""MSAD's teacher: one detector trained on two resolutions of each image and on the fusion of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from torch import nn

from ..assigners import Assignment
from ..backbones.low_resolution import decimate, require_factor
from ..boxes.anchor_grid import AnchorGrid
from ..config.keys import extend_config
from ..errors import UserError
from ..layers.fusion import ScaleFusion
from ..staged import (
    DenseRun,
    StagedDense,
    adapter_of,
    family_of,
    register_staged,
    stage,
    stage_detector,
)

KEY = "MODEL.MSAD"
# Branch -> ending of its losses.
BRANCHES = {"high": "hr", "low": "lr", "fused": "fr"}
FUSION_SCORES = ("per_image", "first_image")

Pyramid = dict[str, torch.Tensor]


@extend_config
def add_config(cfg: CfgNode) -> None:
    # MultiScaleDetector, MSAD's teacher: one detector trained on high and low resolution and on the fusion of both.
    node = cfg.MODEL.MSAD = CfgNode()
    # Meta-architecture of the detector, whose backbone is a pyramid from P2 on.
    node.DETECTOR = "OpenMMLabFCOS"
    # High resolution over low resolution, 2 or 4.
    node.FACTOR = 2
    # Factor on the losses of the fused maps.
    node.JOINT_WEIGHT = 0.4
    # "per_image" or, as in the first published code, the scores of the "first_image" for the whole batch.
    node.FUSION_SCORE = "per_image"
    # Channels of the concatenated maps over hidden channels of the layer that scores them.
    node.FUSION_REDUCTION = 16
    # Maps that detect: "fused", or those of "high" or "low" resolution.
    node.TEST_BRANCH = "fused"


@META_ARCH_REGISTRY.register()
class MultiScaleDetector(nn.Module):
    """A one-stage detector on aligned resolutions, MSAD's teacher (Qi et al., CVPR 2021, arXiv 2109.06875).

    Configured by ``MODEL.MSAD``. The levels that the detector's head reads are, in its usual way, those
    of the whole image: the high branch. Levels of the same sizes come from every FACTOR-th row and column
    of the image through the same backbone, log2 FACTOR levels down: the low branch. :class:`ScaleFusion`
    makes the fused branch of both. Head and losses are the same for all three, with the same anchors,
    ground truth and assignment in pixels of the whole image; an assigner that reads predictions reads each
    branch's own.

    Losses are the detector's own with ``_hr``, ``_lr`` and ``_fr`` behind their names, the latter times
    JOINT_WEIGHT. Detections come from one branch. RetinaNet's running normaliser is updated by each branch.

    Args:
        detector: any :class:`DenseDetector` with a staged adapter; its pyramid has the levels of both
            branches.
        fusion: of two maps.
        factor: of the resolutions, 2 or 4.
        joint_weight: factor on the losses of the fused branch.
        test_branch: "high", "low" or "fused"; what the others alone need is not computed.

    Raises:
        UserError: the pyramid lacks a level or has one that no branch reads.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: DenseDetector,
        fusion: nn.Module,
        factor: int,
        joint_weight: float,
        test_branch: str,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.fusion = fusion
        self.factor = factor
        self.joint_weight = joint_weight
        self.test_branch = test_branch
        self._low_of = _low_levels(detector, factor)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        node = cfg.MODEL.MSAD
        _check(node)
        detector = _inner_class(cfg)(cfg)
        return {
            "detector": detector,
            "fusion": ScaleFusion(
                detector.backbone.output_shape()[detector.head_in_features[0]].channels,
                reduction=node.FUSION_REDUCTION,
                first_image=node.FUSION_SCORE == "first_image",
            ),
            "factor": node.FACTOR,
            "joint_weight": node.JOINT_WEIGHT,
            "test_branch": node.TEST_BRANCH,
        }

    @property
    def device(self) -> torch.device:
        return self.detector.device

    @property
    def pixel_mean(self) -> torch.Tensor:
        return self.detector.pixel_mean

    @property
    def pixel_std(self) -> torch.Tensor:
        return self.detector.pixel_std

    @property
    def backbone(self) -> Backbone:
        return self.detector.backbone

    @property
    def head_in_features(self) -> list[str]:
        return self.detector.head_in_features

    @property
    def size_divisibility(self) -> int:
        """Of the batch, such that both branches have maps of the same sizes; as in MSAD's code."""
        shapes = self.backbone.output_shape()
        return self.factor * max(shapes[name].stride for name in self.head_in_features)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise the images, then pad them with 0 to one batch."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    def high(self, images: torch.Tensor) -> Pyramid:
        """Batch (N, 3, H, W) to the maps that the head reads."""
        maps = self.backbone(images)
        return {name: maps[name] for name in self.head_in_features}

    def low(self, images: torch.Tensor) -> Pyramid:
        """Maps of the decimated batch, by the names of those of the same sizes in :meth:`high`."""
        maps = self.backbone(decimate(images, self.factor))
        return {name: maps[low] for name, low in self._low_of.items()}

    def fuse(self, high: Pyramid, low: Pyramid) -> Pyramid:
        return {name: self.fusion(high[name], low[name]) for name in high}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]):
        """Detectron2's contract: a dict of losses in training, else each image's detections."""
        images = self.preprocess_image(batched_inputs)
        if self.training:
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            return stage_detector(self).run(images, gt_instances).losses
        features = list(self._test_maps(images.tensor).values())
        found = self.detector.forward_inference(images, features, self.detector.head(features))
        outputs = []
        for result, x, (height, width) in zip(found, batched_inputs, images.image_sizes):
            result = detector_postprocess(result, x.get("height", height), x.get("width", width))
            outputs.append({"instances": result})
        return outputs

    def _test_maps(self, images: torch.Tensor) -> Pyramid:
        if self.test_branch == "fused":
            return self.fuse(self.high(images), self.low(images))
        return self.high(images) if self.test_branch == "high" else self.low(images)


@register_staged(MultiScaleDetector)
class StagedMultiScale(StagedDense):
    """The inner detector in stages, on the fused maps; only features and losses are not its own."""

    is_wrapper = True

    def __init__(self, model: MultiScaleDetector) -> None:
        super().__init__(model)
        self.inner: StagedDense = stage_detector(model.detector)
        self.towers = self.inner.towers
        self.predictors = self.inner.predictors
        self.reg_max = self.inner.reg_max
        self.assigns_points = self.inner.assigns_points
        self.assigns_by_outputs = self.inner.assigns_by_outputs

    @classmethod
    def num_classes_key(cls, model_class, cfg) -> str:
        inner = _inner_class(cfg)
        return adapter_of(inner).num_classes_key(inner, cfg)

    @property
    def innermost(self) -> nn.Module:
        return self.inner.innermost

    @property
    def size_divisibility(self) -> int:
        return self.model.size_divisibility

    def features(self, images: ImageList) -> Pyramid:
        return self.model.fuse(self.model.high(images.tensor), self.model.low(images.tensor))

    def predict(self, output, features, level) -> torch.Tensor:
        return self.inner.predict(output, features, level)

    def grid(self, features, images) -> AnchorGrid:
        return self.inner.grid(features, images)

    def assign(self, grid, truth, outputs) -> Assignment:
        return self.inner.assign(grid, truth, outputs)

    def losses(self, grid, outputs, assignment) -> dict[str, torch.Tensor]:
        return self.inner.losses(grid, outputs, assignment)

    def normalizer(self, grid, assignment) -> torch.Tensor:
        return self.inner.normalizer(grid, assignment)

    def class_scores(self, outputs) -> torch.Tensor:
        return self.inner.class_scores(outputs)

    def decode_rows(self, deltas, anchors, strides) -> torch.Tensor:
        return self.inner.decode_rows(deltas, anchors, strides)

    def run(self, images, gt_instances=None, *, taps=None, frozen=False) -> MultiScaleRun:
        return MultiScaleRun(self, images, gt_instances, taps or {}, frozen)


class MultiScaleRun(DenseRun):
    """A batch going through a :class:`MultiScaleDetector`; all stages but losses are of the fused branch."""

    staged: StagedMultiScale

    @stage
    def high(self) -> Pyramid:
        return self.staged.model.high(self.images.tensor)

    @stage
    def low(self) -> Pyramid:
        return self.staged.model.low(self.images.tensor)

    @stage
    def features(self) -> Pyramid:
        return self.staged.model.fuse(self.high, self.low)

    @stage
    def losses(self) -> dict[str, torch.Tensor]:
        """The inner detector's losses of each branch."""
        losses = {}
        for branch, ending in BRANCHES.items():
            weight = self.staged.model.joint_weight if branch == "fused" else 1.0
            for name, loss in self._of_branch(branch).items():
                losses[f"{name}_{ending}"] = loss * weight
        return losses

    def _of_branch(self, branch: str) -> dict[str, torch.Tensor]:
        """The inner detector's losses on the maps of a branch, with the same anchors and, if it can be, assignment."""
        if branch == "fused":
            return self.staged.losses(self.grid, self.outputs, self.assignment)
        run = self.staged.inner.run(self.images, self.gt_instances, frozen=not self.with_gradient)
        run.features, run.grid = getattr(self, branch), self.grid
        if not self.staged.assigns_by_outputs:
            run.assignment = self.assignment
        return run.losses


def _low_levels(detector: DenseDetector, factor: int) -> dict[str, str]:
    """Name of each map that the head reads -> that of the map of the decimated image that has its size."""
    shapes = detector.backbone.output_shape()
    by_stride = {shape.stride: name for name, shape in shapes.items()}
    wanted = {name: shapes[name].stride // factor for name in detector.head_in_features}
    missing = sorted(stride for stride in wanted.values() if stride not in by_stride)
    if missing:
        raise UserError(
            f"{KEY}.FACTOR {factor} needs pyramid maps of stride {missing} for the small images, but the "
            f"backbone of {type(detector).__name__} has strides {sorted(by_stride)}; add 'res2' to "
            "MODEL.FPN.IN_FEATURES (and to MODEL.RESNETS.OUT_FEATURES), or read coarser levels (the "
            "detector's IN_FEATURES)."
        )
    low_of = {name: by_stride[stride] for name, stride in wanted.items()}
    unused = [name for name in shapes if name not in (*low_of, *low_of.values())]
    if unused:
        raise UserError(
            f"The pyramid of {type(detector).__name__} has {', '.join(unused)}, which neither resolution of "
            f"{KEY} reads; leave such levels out (MODEL.FPN.IN_FEATURES, MODEL.FPN.TOP_BLOCK), or read more "
            "(the detector's IN_FEATURES)."
        )
    return low_of


def _check(node) -> None:
    """Reject what the options of ``MODEL.MSAD`` cannot mean."""
    require_factor(node.FACTOR, f"{KEY}.FACTOR")
    for key, value, choices in (
        ("FUSION_SCORE", node.FUSION_SCORE, FUSION_SCORES),
        ("TEST_BRANCH", node.TEST_BRANCH, tuple(BRANCHES)),
    ):
        if value not in choices:
            raise UserError(f"{KEY}.{key} is {value!r}; choose from {', '.join(choices)}.")


def _inner_class(cfg) -> type[DenseDetector]:
    """Return the class that ``MODEL.MSAD.DETECTOR`` names.

    Raises:
        UserError: it is not a one-stage detector.
    """
    name = cfg.MODEL.MSAD.DETECTOR
    if family_of(name) != "dense" or adapter_of(META_ARCH_REGISTRY.get(name)).is_wrapper:
        raise UserError(
            f"{KEY}.DETECTOR is {name!r}, which is no one-stage detector; choose one such as RetinaNet, "
            "OpenMMLabFCOS or GFL."
        )
    return META_ARCH_REGISTRY.get(name)

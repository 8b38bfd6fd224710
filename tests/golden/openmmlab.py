"""Our detectors over recorded feature maps, with recorded OpenMMLab heads, predictions and ground truth.

Detectors are built from configs, as a user's are; only their backbone is replaced. What is particular to the order
of OpenMMLab's anchors and to the names of its layers is here, and so is whatever reaches into the stages of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from d2_distill import assigners
from d2_distill.apps.conversion.openmmlab import Tensors, dense_head
from d2_distill.assigners import Assignment, match_atss
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.building import build_detector, num_classes_key
from d2_distill.methods.localization import ValuableRegion
from d2_distill.regions import valuable_region
from d2_distill.staged import DenseRun, stage_detector

# OpenMMLab's name of a box loss, and of its mode where it has several -> ours.
BOX_LOSSES = {
    "GIoULoss": "giou",
    "CIoULoss": "ciou",
    "DIoULoss": "diou",
    "IoULoss": "iou",
    ("IoULoss", "log"): "iou",
    ("IoULoss", "linear"): "linear_iou",
    "L1Loss": "smooth_l1",  # of deltas
}
# Of OpenMMLab's RetinaNet, where a case does not say otherwise.
RETINANET_ANCHORS = {"base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0]}
# How OpenMMLab writes that a range of sizes has no lower or no upper bound.
UNBOUNDED = (-1, 1e8)


@BACKBONE_REGISTRY.register()
class GivenMaps(Backbone):
    """Returns ``maps``, one a level, for whatever images; ``MODEL.GIVEN_MAPS`` tells their channels and strides."""

    size_divisibility = 32  # what OpenMMLab's configs pad images to

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None) -> None:
        super().__init__()
        node = cfg.MODEL.GIVEN_MAPS
        self._shapes = {
            f"p{level}": ShapeSpec(channels=channels, stride=stride)
            for level, (channels, stride) in enumerate(zip(node.CHANNELS, node.STRIDES))
        }
        self.maps: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._shapes, self.maps))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def given_cfg(
    architecture: str, strides: Sequence[int], channels: int, settings: Mapping[str, Any]
) -> CfgNode:
    """Config of a detector over GivenMaps whose towers, unless the settings give it some, have no blocks.

    Args:
        settings: config keys below MODEL.
    """
    assert all(coarse == 2 * fine for fine, coarse in zip(strides, strides[1:])), f"no pyramid has strides {strides}"
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = architecture, "cpu", "GivenMaps"
    cfg.MODEL.GIVEN_MAPS = CfgNode({"CHANNELS": [channels] * len(strides), "STRIDES": list(strides)})
    family = num_classes_key(cfg).split(".")[1]
    own: dict[str, Any] = {f"{family}.IN_FEATURES": [f"p{level}" for level in range(len(strides))]}
    if "NUM_CONVS" in cfg.MODEL[family]:
        own[f"{family}.NUM_CONVS"] = 0
    set_keys(cfg, {**own, **settings})
    return cfg


def set_keys(cfg: CfgNode, settings: Mapping[str, Any], prefix: str = "MODEL.") -> None:
    """Set keys, whose names are given without a common prefix."""
    cfg.merge_from_list([item for key, value in settings.items() for item in (prefix + key, value)])


def build_given(
    architecture: str,
    strides: Sequence[int],
    settings: Mapping[str, Any],
    *,
    maps: Sequence[torch.Tensor] = (),
    channels: int = 1,
    groups: int | None = None,
    test: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the detector of :func:`given_cfg`.

    Args:
        maps: feature maps that its backbone returns; ``channels`` are theirs if there are any.
        groups: of the group norms, where they are not the 32 that NORM "GN" stands for.
        test: config keys below TEST.
    """
    cfg = given_cfg(architecture, strides, maps[0].shape[1] if maps else channels, settings)
    set_keys(cfg, test or {}, "TEST.")
    if groups is None:
        model = build_detector(cfg)
    else:
        with mock.patch("torch.nn.GroupNorm", lambda _, dim: _group_norm(groups, dim)):
            model = build_detector(cfg)
    model.backbone.maps = list(maps)
    return model


_group_norm = nn.GroupNorm


def anchor_settings(
    strides: Sequence[int], base_scale: float, scales_per_octave: int, ratios: Sequence[float], offset: float = 0.0
) -> dict[str, Any]:
    """Detectron2's keys for OpenMMLab's AnchorGenerator."""
    scales = [base_scale * 2 ** (octave / scales_per_octave) for octave in range(scales_per_octave)]
    return {
        "ANCHOR_GENERATOR.SIZES": [[stride * scale for scale in scales] for stride in strides],
        "ANCHOR_GENERATOR.ASPECT_RATIOS": [list(ratios)],
        "ANCHOR_GENERATOR.OFFSET": offset,
    }


def point_bounds(ranges: Sequence[Sequence[float]]) -> list[float]:
    """SIZES_OF_INTEREST for OpenMMLab's or MSAD's ranges of sizes, one a level."""
    starts, ends = zip(*ranges)
    assert (starts[0], ends[-1]) == UNBOUNDED and starts[1:] == ends[:-1], f"ranges {ranges} leave gaps"
    return [float(end) for end in ends[:-1]]


def num_sizes_and_ratios(model: nn.Module) -> tuple[int, int]:
    """Of the anchors of a cell."""
    anchors = next(iter(model.anchor_generator.cell_anchors))
    num_sizes = len((anchors[:, 2:] - anchors[:, :2]).prod(dim=1).log2().round(decimals=2).unique())
    return num_sizes, len(anchors) // num_sizes


def recorded_anchors(model: nn.Module) -> torch.Tensor:
    """(A,) the recorded index of each of our anchors of a cell."""
    return in_our_order(model, torch.arange(model.anchor_generator.num_anchors[0]))


def in_our_order(model: nn.Module, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Blocks of a cell's anchors, in the recorded order, in Detectron2's."""
    return to_size_outer(tensor, *num_sizes_and_ratios(model), dim=dim)


def labels_in_our_order(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Recorded labels (N, R_l) of a level in the order of our anchors."""
    cells = labels.unflatten(1, (-1, model.anchor_generator.num_anchors[0]))
    return in_our_order(model, cells, dim=2).flatten(1)


def given_run(
    model: nn.Module,
    predictions: Mapping[str, Sequence[torch.Tensor]],
    image_sizes: Sequence[Sequence[int]],
    gt_instances: list[Instances] | None = None,
    *,
    frozen: bool = False,
) -> DenseRun:
    """A run whose predictions are given instead of computed.

    Args:
        predictions: output name -> recorded maps (N, A*K, H, W), a level each, in the recorded order of anchors.
        image_sizes: (height, width) of each image.
    """
    staged = stage_detector(model)
    first = predictions["logits"][0]
    assert_channels(model, predictions)
    sides = [side * staged.strides[0] for side in first.shape[-2:]]
    assert len(first) == len(image_sizes) and all(h <= sides[0] and w <= sides[1] for h, w in image_sizes)
    if not model.backbone.maps:
        channels = next(iter(model.backbone.output_shape().values())).channels
        model.backbone.maps = [x.new_zeros(len(x), channels, *x.shape[-2:]) for x in predictions["logits"]]
    images = ImageList(torch.zeros(len(first), 3, *sides), [tuple(map(int, size)) for size in image_sizes])
    run = staged.run(images, gt_instances, frozen=frozen)
    run.predictions = {
        output: [in_our_order(model, x, dim=1) for x in levels] for output, levels in predictions.items()
    }
    return run


def assert_channels(model: nn.Module, predictions: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Prediction maps are such as the model's layers would return."""
    for output, levels in predictions.items():
        if output in model.head.predictors:
            _, layer = model.head.predictors[output]
            assert {x.shape[1] for x in levels} == {layer.out_channels}, output


def recorded_labels(labels: torch.Tensor, weights: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Recorded labels as ours, which are -1 for anchors of weight 0; the reference calls those background."""
    assert set(weights.unique().tolist()) <= {0, 1} and (labels[weights == 0] == num_classes).all()
    return labels.masked_fill(weights == 0, -1)


def assignment_of(labels: torch.Tensor, boxes: torch.Tensor, num_classes: int) -> Assignment:
    """A given assignment: labels (N, R), of which ``num_classes`` is the background, and boxes (N, R, 4)."""
    return Assignment(labels, boxes, num_classes)


def level_sizes(run: DenseRun) -> list[int]:
    """Anchors of each level."""
    return run.grid.level_sizes


def atss_matches(run: DenseRun) -> torch.Tensor:
    """(N, R) index of the box that an anchor is positive for under ATSS, negative for none."""
    return match_atss(
        run.grid.boxes,
        level_sizes(run),
        run.truth.boxes,
        run.truth.valid,
        run.grid.valid,
        topk=run.staged.model.assigner.topk,
    ).matches


def atss_thresholds(run: DenseRun) -> torch.Tensor:
    """(N, G) IoU from which on a candidate is positive."""
    return assigners.atss_thresholds(
        run.grid.boxes,
        level_sizes(run),
        run.truth.boxes,
        run.grid.valid,
        topk=run.staged.model.assigner.topk,
    )


def valuable_values(run: DenseRun, region: ValuableRegion, thresholds: torch.Tensor) -> torch.Tensor:
    """(N, R) values of LD's valuable region under given thresholds (N, G)."""
    return valuable_region(
        run.grid.boxes,
        run.truth.boxes,
        run.truth.valid,
        thresholds,
        run.grid.valid,
        region.gamma,
        region.overlap,
    )


def instances_of(size: Sequence[int], boxes: torch.Tensor, classes: torch.Tensor) -> Instances:
    """Ground truth of an image."""
    instances = Instances(tuple(int(side) for side in size))
    instances.gt_boxes, instances.gt_classes = Boxes(boxes), classes
    return instances


_LAYERS = {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}


def parameter_name(model: nn.Module, recorded: str) -> str:
    """State-dict name of a recorded parameter: ``cls_convs.1.gn.bias`` is ``head.cls_subnet.4.bias``."""
    module, *rest = recorded.split(".")
    if module in ("cls_convs", "reg_convs"):
        index, part, kind = rest
        name = "cls_subnet" if module == "cls_convs" else "bbox_subnet"
        per_block = [isinstance(layer, nn.ReLU) for layer in getattr(model.head, name)].index(True) + 1
        return f"head.{name}.{per_block * int(index) + (part == 'gn')}.{kind}"
    if module in ("scales", "reg_conf"):
        return f"head.{recorded}"
    return f"head.{_LAYERS[module.split('_')[1]]}.{rest[0]}"


def load_head(model: nn.Module, recorded: Mapping[str, torch.Tensor]) -> None:
    """Copy a recorded head into the model; every parameter of the head must be there."""
    tensors = Tensors({f"bbox_head.{key}": value.float() for key, value in recorded.items()}, "the recording")
    state, _ = dense_head(tensors)
    assert not tensors.left
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("head.")]

"""Builds our detectors from recorded OpenMMLab heads: weights, feature maps and ground truth of one case."""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from torch import nn

from d2_distill import losses
from d2_distill.apps.conversion.openmmlab import Tensors, dense_head
from d2_distill.assigners import ATSSAssigner, MaxIoUAssigner, PointAssigner
from d2_distill.detectors import ATSS, GFL, GFLv2, OpenMMLabFCOS, OpenMMLabRetinaNet, TowerDetector
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.box_coders import DeltaCoder, DistanceCoder, DistributionCoder
from d2_distill.detectors.head import QualityHead, TowerHead
from d2_distill.detectors.tower_detector import square_anchors

from .cases import Case

NUM_SIZES = NUM_RATIOS = 3

BOX_LOSSES = {
    "GIoULoss": losses.giou_loss,
    "CIoULoss": losses.ciou_loss,
    "IoULoss": losses.log_iou_loss,
    "L1Loss": None,
}


class GivenMaps(Backbone):
    """Returns the recorded feature maps for whatever images; the recording did the same."""

    def __init__(self, maps: list[torch.Tensor], strides: list[int]) -> None:
        super().__init__()
        self.maps, self.strides = maps, strides

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"p{level}": tensor for level, tensor in enumerate(self.maps)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"p{level}": ShapeSpec(channels=tensor.shape[1], stride=stride)
            for level, (tensor, stride) in enumerate(zip(self.maps, self.strides))
        }


def retinanet_anchors(shapes: list[ShapeSpec]) -> DefaultAnchorGenerator:
    strides = [shape.stride for shape in shapes]
    return DefaultAnchorGenerator(
        sizes=[[4 * stride * 2 ** (octave / NUM_SIZES) for octave in range(NUM_SIZES)] for stride in strides],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=strides,
        offset=0.0,
    )


_ATSS_ANCHORS = functools.partial(square_anchors, scale=8, offset=0.0)
_FOCAL = {"focal_loss_alpha": 0.25, "focal_loss_gamma": 2.0}
_GFL = {
    "assigner": ATSSAssigner(topk=9),
    "box_coder": DistributionCoder(reg_max=16),
    "box_loss": losses.giou_loss,
    "box_loss_weight": 2.0,
    "quality_beta": 2.0,
    "dfl_weight": 0.25,
    "normalizer_floor": 1e-6,
}
# Detector -> what makes its anchors, its arguments, and its head's; as in the references' configs.
# FCOS has no assigner: every case has its own ranges of sizes.
_PUBLISHED: dict[type[TowerDetector], tuple] = {
    GFL: (_ATSS_ANCHORS, _GFL, {}),
    GFLv2: (_ATSS_ANCHORS, _GFL, {"quality_topk": 4, "quality_channels": 64}),
    ATSS: (
        _ATSS_ANCHORS,
        {
            "assigner": ATSSAssigner(topk=9),
            "box_coder": DeltaCoder((10.0, 10.0, 5.0, 5.0)),
            "box_loss": losses.giou_loss,
            "box_loss_weight": 2.0,
            "normalizer_floor": 1.0,
            **_FOCAL,
        },
        {"centerness_on": "box"},
    ),
    OpenMMLabFCOS: (
        functools.partial(square_anchors, scale=1.0, offset=0.5),
        {
            "box_coder": DistanceCoder("exp"),
            "box_loss": losses.log_iou_loss,
            "box_loss_weight": 1.0,
            "normalizer_floor": 1e-6,
            **_FOCAL,
        },
        {"centerness_on": "cls"},
    ),
    OpenMMLabRetinaNet: (
        retinanet_anchors,
        {
            "assigner": MaxIoUAssigner(thresholds=(0.4, 0.5), labels=(0, -1, 1)),
            "box_coder": DeltaCoder((1.0, 1.0, 1.0, 1.0)),
            "box_loss": None,
            "box_loss_weight": 1.0,
            **_FOCAL,
        },
        {"tower_bias": True, "use_scale": False},
    ),
}


def build_detector(
    model_class: type[TowerDetector],
    maps: list[torch.Tensor],
    strides: list[int],
    num_classes: int,
    *,
    num_convs: int = 0,
    norm: Callable[[int], nn.Module] = "",
    head: dict[str, Any] | None = None,
    **overrides: Any,
) -> TowerDetector:
    """A detector over the given maps, in its published form.

    Args:
        maps: what the head reads; for cases without towers, any maps of the right sizes.
        head: arguments of the head that differ from the published form.
        overrides: constructor arguments of the detector that do.
    """
    backbone = GivenMaps(maps, strides)
    shapes = list(backbone.output_shape().values())
    make_anchors, published, head_published = _PUBLISHED[model_class]
    arguments = {
        "anchor_generator": make_anchors(shapes),
        "test_score_thresh": 0.05,
        "test_topk_candidates": 1000,
        "test_nms_thresh": 0.6,
        "max_detections_per_image": 100,
        **published,
        **overrides,
    }
    common = {
        "input_shape": shapes,
        "num_anchors": arguments["anchor_generator"].num_anchors[0],
        "conv_dims": [shapes[0].channels] * num_convs,
        "norm": norm,
        **head_published,
        **(head or {}),
    }
    coder = arguments["box_coder"]
    if model_class is GFLv2:
        built = QualityHead(num_scores=num_classes + 1, reg_max=coder.reg_max, **common)
    else:
        built = TowerHead(num_scores=num_classes, box_dim=coder.box_dim, **common)
    return model_class(
        backbone=backbone,
        head=built,
        head_in_features=list(backbone.output_shape()),
        num_classes=num_classes,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
        **arguments,
    )


def build_recorded(case: Case, role: str, requires_grad: bool = False):
    """The student or teacher of a CrossKD case with its weights, and its feature maps."""
    data, config = case.data, case.data["head_config"]
    maps = maps_of(case, f"{role}_feat", requires_grad=requires_grad)
    overrides: dict[str, Any] = {
        "box_loss": BOX_LOSSES[config["loss_bbox"]["type"]],
        "box_loss_weight": config["loss_bbox"]["loss_weight"],
    }
    head: dict[str, Any] = {}
    if data["detector"] == "gfl":
        overrides["normalizer_floor"] = 1.0
    if data["detector"] == "fcos":
        bounds = tuple(float(end) for _, end in config["regress_ranges"][:-1])
        overrides["assigner"] = PointAssigner(bounds, 1.5 if config.get("center_sampling") else 0.0)
        if config.get("norm_on_bbox"):
            overrides["box_coder"] = DistanceCoder("relu")
        if config.get("centerness_on_reg"):
            head["centerness_on"] = "box"
    model = build_detector(
        {"gfl": GFL, "atss": ATSS, "fcos": OpenMMLabFCOS, "retinanet": OpenMMLabRetinaNet}[data["detector"]],
        maps,
        data["strides"],
        data["num_classes"],
        num_convs=data["stacked_convs"],
        norm=functools.partial(nn.GroupNorm, data["gn_groups"]) if data["gn_groups"] else "",
        head=head,
        **overrides,
    )
    prefix = f"{role}."
    load_head(model, {key[len(prefix) :]: case.tensor(key) for key in case.arrays if key.startswith(prefix)})
    return model, maps


_LAYERS = {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}


def parameter_name(model: TowerDetector, recorded: str) -> str:
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


def load_head(model: TowerDetector, recorded: dict[str, torch.Tensor]) -> None:
    """Copy a recorded head into the model; every parameter of the head must be there."""
    tensors = Tensors({f"bbox_head.{key}": value.float() for key, value in recorded.items()}, "the recording")
    state, _ = dense_head(tensors)
    assert not tensors.left
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("head.")]


def in_our_order(model: TowerDetector, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Blocks of a cell's anchors, in the recorded order, in Detectron2's."""
    if model.anchor_generator.num_anchors[0] == 1:
        return tensor
    return to_size_outer(tensor, NUM_SIZES, NUM_RATIOS, dim=dim)


def labels_in_our_order(model: TowerDetector, labels: torch.Tensor) -> torch.Tensor:
    """Recorded labels (N, R_l) of a level in the order of our anchors."""
    cells = labels.unflatten(1, (-1, model.anchor_generator.num_anchors[0]))
    return in_our_order(model, cells, dim=2).flatten(1)


def flat_outputs(model: TowerDetector, **maps: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Recorded prediction maps by output name, as ``model.losses`` takes them; gradients flow to the maps."""
    per_cell, flat = model.anchor_generator.num_anchors[0], {}
    for name, levels in maps.items():
        levels = [in_our_order(model, x, dim=1).unflatten(1, (per_cell, -1)) for x in levels]
        flat[name] = [x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]
    return flat


def instances_of(size, boxes: torch.Tensor, classes: torch.Tensor) -> Instances:
    """Ground truth of an image."""
    instances = Instances(tuple(int(side) for side in size))
    instances.gt_boxes, instances.gt_classes = Boxes(boxes), classes
    return instances


def batched_inputs(case: Case) -> list[dict]:
    """Images of the recorded sizes (their pixels do not matter) with the recorded ground truth."""
    return [
        {
            "image": torch.zeros(3, *size),
            "instances": instances_of(
                size, case.tensor(f"in.gt_boxes.{index}"), case.tensor(f"in.gt_labels.{index}")
            ),
        }
        for index, size in enumerate(case.arrays["in.img_shape"].tolist())
    ]


def maps_of(case: Case, key: str, requires_grad: bool = False) -> list[torch.Tensor]:
    """Recorded maps ``in.<key>.<level>``."""
    return [
        case.tensor(f"in.{key}.{level}").requires_grad_(requires_grad)
        for level in range(len(case.data["strides"]))
    ]

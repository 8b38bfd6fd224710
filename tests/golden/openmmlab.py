"""Builds our RetinaNet from a recorded OpenMMLab head: weights, feature maps and ground truth of one case."""

from __future__ import annotations

from typing import Dict, List

import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances

from d2_distill.assigners import MaxIoUMatcher
from d2_distill.detectors import OpenMMLabRetinaNet
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.box_coder import TwoSidedBox2BoxTransform

from .cases import Case

NUM_SIZES = NUM_RATIOS = 3


class GivenMaps(Backbone):
    """Returns the recorded feature maps for whatever images; the recording did the same."""

    def __init__(self, maps: List[torch.Tensor], strides: List[int]) -> None:
        super().__init__()
        self.maps, self.strides = maps, strides

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {f"p{level}": tensor for level, tensor in enumerate(self.maps)}

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {
            f"p{level}": ShapeSpec(channels=tensor.shape[1], stride=stride)
            for level, (tensor, stride) in enumerate(zip(self.maps, self.strides))
        }


def build_retinanet(maps: List[torch.Tensor], strides: List[int], num_classes: int, num_convs: int):
    """OpenMMLabRetinaNet over the given maps, with the anchors of the reference."""
    backbone = GivenMaps(maps, strides)
    shapes = list(backbone.output_shape().values())
    return OpenMMLabRetinaNet(
        backbone=backbone,
        head=RetinaNetHead(
            input_shape=shapes,
            num_classes=num_classes,
            num_anchors=NUM_SIZES * NUM_RATIOS,
            conv_dims=[shapes[0].channels] * num_convs,
        ),
        head_in_features=list(backbone.output_shape()),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[
                [4 * stride * 2 ** (octave / NUM_SIZES) for octave in range(NUM_SIZES)] for stride in strides
            ],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=strides,
            offset=0.0,
        ),
        box2box_transform=TwoSidedBox2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=MaxIoUMatcher([0.4, 0.5], [0, -1, 1]),
        num_classes=num_classes,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )


def parameter_name(recorded: str) -> str:
    """State-dict name of a recorded parameter: ``cls_convs.1.conv.bias`` is ``head.cls_subnet.2.bias``."""
    parts = recorded.split(".")
    if parts[0] in ("cls_convs", "reg_convs"):
        subnet = "cls_subnet" if parts[0] == "cls_convs" else "bbox_subnet"
        return f"head.{subnet}.{2 * int(parts[1])}.{parts[-1]}"
    return {"retina_cls": "head.cls_score", "retina_reg": "head.bbox_pred"}[parts[0]] + f".{parts[-1]}"


def load_head(model: torch.nn.Module, case: Case, prefix: str) -> None:
    """Copy the recorded head ``<prefix>.*`` into the model; every parameter of the head must be there."""
    state = {}
    for key in case.arrays:
        if key.startswith(f"{prefix}."):
            name = parameter_name(key[len(prefix) + 1 :])
            value = case.tensor(key)
            last = name.startswith(("head.cls_score", "head.bbox_pred"))
            state[name] = to_size_outer(value, NUM_SIZES, NUM_RATIOS) if last else value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("head.")]


def batched_inputs(case: Case) -> List[dict]:
    """Images of the recorded sizes (their pixels do not matter) with the recorded ground truth."""
    inputs = []
    for index, size in enumerate(case.arrays["in.img_shape"].tolist()):
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(case.tensor(f"in.gt_boxes.{index}"))
        instances.gt_classes = case.tensor(f"in.gt_labels.{index}")
        inputs.append({"image": torch.zeros(3, *size), "instances": instances})
    return inputs


def maps_of(case: Case, key: str, requires_grad: bool = False) -> List[torch.Tensor]:
    """Recorded maps ``in.<key>.<level>``."""
    return [
        case.tensor(f"in.{key}.{level}").requires_grad_(requires_grad)
        for level in range(len(case.data["strides"]))
    ]

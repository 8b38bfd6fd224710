"""The detectors that a recipe can choose: keys of backbones and heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .choices import STRIDES, anchors

LEVELS = ["p3", "p4", "p5"]
STAGES = ["res3", "res4", "res5"]


@dataclass(frozen=True)
class Backbone:
    """A backbone by its config keys below ``MODEL``.

    Attributes:
        name: for people.
        builder: ``MODEL.BACKBONE.NAME``.
        weights: ``MODEL.WEIGHTS``; "" from scratch.
        resnets: keys of ``MODEL.RESNETS``.
    """

    name: str
    builder: str
    weights: str = ""
    resnets: dict[str, Any] = field(default_factory=dict)


def _narrow(width: int, depth: int = 18) -> Backbone:
    keys = {"DEPTH": depth, "NORM": "BN", "STEM_OUT_CHANNELS": width, "RES2_OUT_CHANNELS": width}
    return Backbone(f"ResNet-{depth}, {width} channels at stride 4", "build_narrow_resnet_fpn_backbone", "", keys)


def _resnet(depth: int) -> Backbone:
    keys = {"DEPTH": depth, "NORM": "BN", "STRIDE_IN_1X1": False, "RES2_OUT_CHANNELS": 64 if depth < 50 else 256}
    return Backbone(f"ResNet-{depth}", "build_p3p7_resnet_fpn_backbone", f"torchvision://resnet{depth}", keys)


_MOBILENET = Backbone("MobileNetV2", "build_mobilenet_v2_fpn_backbone", "torchvision://mobilenet_v2")
# (size, whether pretrained) -> student, teacher. None has fewer than 3 levels, and each teacher is the larger one.
PAIRS = {
    ("tiny", True): (_MOBILENET, _resnet(18)),
    ("small", True): (_MOBILENET, _resnet(50)),
    ("medium", True): (_resnet(18), _resnet(101)),
    ("tiny", False): (_narrow(16), _narrow(32)),
    ("small", False): (_narrow(32), _narrow(64)),
    ("medium", False): (_narrow(64), _narrow(64, depth=34)),
}
# Meta-architecture -> its node below MODEL.
HEADS = {"GFL": "GFL", "ATSS": "ATSS", "OpenMMLabFCOS": "FCOS", "RetinaNet": "RETINANET"}


def head_keys(head: str, scale: int, convs: int) -> dict[str, dict[str, Any]]:
    """Return the keys of a head below ``MODEL``, whose anchors have a side of ``scale`` strides."""
    keys: dict[str, Any] = {"IN_FEATURES": LEVELS, "NUM_CONVS": convs}
    if head == "RetinaNet":
        octaves = [[float(f"{side * 2 ** (step / 3):.3g}") for step in range(3)] for side in anchors(scale)]
        return {"RETINANET": {**keys, "NORM": "GN"}, "ANCHOR_GENERATOR": {"SIZES": octaves}}
    if head == "OpenMMLabFCOS":
        # Published: 64 at stride 8, where anchors of 8 strides are 64 wide.
        return {"FCOS": {**keys, "SIZES_OF_INTEREST": [scale * stride for stride in STRIDES[:-1]]}}
    return {HEADS[head]: {**keys, "ANCHOR_SCALE": scale}}

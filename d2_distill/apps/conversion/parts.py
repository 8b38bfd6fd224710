"""ResNets, feature pyramids and Faster R-CNN: our names of their tensors, and what their shapes tell."""

from __future__ import annotations

from typing import Any

from ...checkpoint.torchvision import PIXEL_MEAN, PIXEL_STD, resnet_rules
from ...errors import UserError
from .tensors import Converted, Tensors

# (blocks of each stage, whether they are bottlenecks) -> depth
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
# How torchvision's ImageNet weights see images, and where their ResNets have the stride.
TORCHVISION_STYLE: dict[str, Any] = {
    "MODEL.PIXEL_MEAN": list(PIXEL_MEAN),
    "MODEL.PIXEL_STD": list(PIXEL_STD),
    "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}


def resnet(tensors: Tensors, *, two_stage: bool, prefix: str) -> Converted:
    """Take a ResNet, wide ResNet or ResNeXt in torchvision's names, with deformable convolutions or not.

    Args:
        two_stage: whether the pyramid stands on res2 to res5, or on res3 to res5.
        prefix: pattern of what the names begin with.

    Raises:
        UserError: it has blocks of no ResNet that Detectron2 builds.
    """
    settings = {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone" if two_stage else "build_p3p7_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": _stages(two_stage),
        **_resnet_settings(tensors, prefix),
    }
    return tensors.take(resnet_rules(prefix, "backbone.bottom_up.")), settings


def _stages(two_stage: bool) -> list[str]:
    """What the pyramid stands on."""
    return [f"res{level}" for level in range(2 if two_stage else 3, 6)]


def _resnet_settings(tensors: Tensors, prefix: str) -> dict[str, Any]:
    stages = [rf"{prefix}layer{stage}\." for stage in range(1, 5)]
    blocks = tuple(len(tensors.names(stage + r"\d+\.conv1\.weight")) for stage in stages)
    bottleneck = bool(tensors.names(stages[0] + r"0\.conv3\.weight"))
    if (blocks, bottleneck) not in _DEPTHS:
        raise UserError(
            f"{tensors.source} has a backbone with {blocks} {'bottleneck' if bottleneck else 'basic'} "
            "blocks in layer1 to layer4; of ResNets, those of depth 18, 34, 50, 101 and 152 can be converted."
        )
    settings: dict[str, Any] = {"MODEL.RESNETS.DEPTH": _DEPTHS[blocks, bottleneck]}
    width, in_channels = tensors.shape(stages[0] + r"0\.conv2\.weight")[:2]
    if not bottleneck:
        settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = width
    elif (width, in_channels) != (64, 64):  # ResNeXt or a wide ResNet
        settings["MODEL.RESNETS.NUM_GROUPS"] = width // in_channels
        settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = in_channels
    offsets = [stage + r"0\.conv2\.conv_offset\.bias" for stage in stages]
    deformable = [bool(tensors.names(offset)) for offset in offsets]
    if any(deformable):
        settings["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] = deformable
        settings.update(_offset_settings(tensors.shape(offsets[deformable.index(True)])[0]))
    return settings


def _offset_settings(channels: int) -> dict[str, Any]:
    """Version and groups of deformable 3x3 convolutions with so many channels of offsets; {} if both versions fit."""
    # A group has x and y of 9 points; version 2 also a factor of each.
    fitting = [(modulated, size) for modulated, size in ((False, 18), (True, 27)) if channels % size == 0]
    if len(fitting) != 1:
        return {}
    [(modulated, size)] = fitting
    return {"MODEL.RESNETS.DEFORM_MODULATED": modulated, "MODEL.RESNETS.DEFORM_NUM_GROUPS": channels // size}


def pyramid(
    tensors: Tensors, *, two_stage: bool, lateral: str, output: str, top: tuple[str, str]
) -> Converted:
    """Take an FPN: P2 to P5 of a two-stage detector (P6 is max-pooled), P3 to P7 of the others.

    Args:
        lateral, output: patterns of a level's convolutions, with ``{}`` for its number from fine to coarse.
        top: patterns of the convolutions of P6 and P7.

    Raises:
        UserError: it has other levels.
    """
    laterals = tensors.names(lateral.format(r"\d+") + r"\.weight")
    outputs = {name for conv in (output.format(r"\d+"), *top) for name in tensors.names(conv + r"\.weight")}
    found, expected = (len(laterals), len(outputs)), (4, 4) if two_stage else (3, 5)
    if found != expected:
        raise UserError(
            f"{tensors.source} has a pyramid with {found[0]} lateral and {found[1]} output convolutions; "
            f"this detector can be converted with {expected[0]} and {expected[1]}."
        )
    stages = _stages(two_stage)
    settings: dict[str, Any] = {
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.FPN.OUT_CHANNELS": tensors.shape(lateral.format(0) + r"\.weight")[0],
        "MODEL.FPN.TOP_BLOCK": "MaxPool" if two_stage else "P6P7",
    }
    rules = []
    for index, stage in enumerate(stages):
        level = stage[len("res") :]
        rules.append((lateral.format(index) + r"\.(\w+)", rf"backbone.fpn_lateral{level}.\1"))
        rules.append((output.format(index) + r"\.(\w+)", rf"backbone.fpn_output{level}.\1"))
    if not two_stage:
        on_output = tensors.shape(top[0] + r"\.weight")[1] == settings["MODEL.FPN.OUT_CHANNELS"]
        settings["MODEL.FPN.TOP_BLOCK_IN_FEATURE"] = "p5" if on_output else "res5"
        for level, conv in zip((6, 7), top):
            rules.append((conv + r"\.(\w+)", rf"backbone.top_block.p{level}.\1"))
    return tensors.take(rules), settings


def faster_rcnn_settings(*, num_classes: int, num_fc: int, fc_dim: int, resolution: int) -> dict[str, Any]:
    """Of Faster R-CNN with FPN as published by all: one anchor size a level, 1000 proposals.

    Args:
        num_classes: without the background.
        num_fc, fc_dim: number and outputs of the box head's linear layers.
        resolution: side of a pooled region.
    """
    levels = ["p2", "p3", "p4", "p5"]
    return {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES": [*levels, "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": levels,
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": num_fc,
        "MODEL.ROI_BOX_HEAD.FC_DIM": fc_dim,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": resolution,
    }

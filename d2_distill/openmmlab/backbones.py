"""ResNets, Swin Transformers and feature pyramids: our names of their tensors, and what their shapes tell."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterator, List, Tuple

import torch

from ..errors import UserError
from .tensors import Converted, Tensors

# (blocks of each stage, whether they are bottlenecks) -> depth
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_OURS = "backbone.bottom_up."


def is_swin(tensors: Tensors) -> bool:
    return bool(tensors.names(r"backbone\.patch_embed\.projection\.weight"))


def resnet(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take a ResNet or ResNeXt ``backbone.*``, with deformable convolutions or not.

    Raises:
        UserError: it has blocks of no ResNet that Detectron2 builds.
    """
    settings = {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone" if two_stage else "build_p3p7_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": _stages(two_stage),
        **_resnet_settings(tensors),
    }
    return tensors.take(_resnet_rules()), settings


def _stages(two_stage: bool) -> List[str]:
    """What the pyramid stands on."""
    return [f"res{level}" for level in range(2 if two_stage else 3, 6)]


def _resnet_rules() -> Iterator[Tuple[str, str]]:
    yield r"backbone\.conv1\.weight", _OURS + "stem.conv1.weight"
    yield r"backbone\.bn1\.(\w+)", _OURS + r"stem.conv1.norm.\1"
    for stage in range(1, 5):
        theirs, ours = rf"backbone\.layer{stage}\.(\d+)\.", _OURS + rf"res{stage + 1}.\1."
        yield theirs + r"conv(\d)\.weight", ours + r"conv\2.weight"
        yield theirs + r"bn(\d)\.(\w+)", ours + r"conv\2.norm.\3"
        yield theirs + r"conv2\.conv_offset\.(\w+)", ours + r"conv2_offset.\2"
        yield theirs + r"downsample\.0\.weight", ours + "shortcut.weight"
        yield theirs + r"downsample\.1\.(\w+)", ours + r"shortcut.norm.\2"


def _resnet_settings(tensors: Tensors) -> Dict[str, Any]:
    stages = [rf"backbone\.layer{stage}\." for stage in range(1, 5)]
    blocks = tuple(len(tensors.names(stage + r"\d+\.conv1\.weight")) for stage in stages)
    bottleneck = bool(tensors.names(stages[0] + r"0\.conv3\.weight"))
    if (blocks, bottleneck) not in _DEPTHS:
        raise UserError(
            f"{tensors.source} has a backbone with {blocks} {'bottleneck' if bottleneck else 'basic'} "
            "blocks in layer1 to layer4; only ResNet-18, -34, -50, -101 and -152 and Swin can be converted."
        )
    settings: Dict[str, Any] = {"MODEL.RESNETS.DEPTH": _DEPTHS[blocks, bottleneck]}
    width, in_channels = tensors.shape(stages[0] + r"0\.conv2\.weight")[:2]
    if not bottleneck:
        settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = width
    elif width != in_channels:  # ResNeXt
        settings["MODEL.RESNETS.NUM_GROUPS"] = width // in_channels
        settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = in_channels
    offsets = [stage + r"0\.conv2\.conv_offset\.bias" for stage in stages]
    deformable = [bool(tensors.names(offset)) for offset in offsets]
    if any(deformable):
        settings["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] = deformable
        # x and y of 9 points; version 2 also has a factor of each
        channels = tensors.shape(offsets[deformable.index(True)])[0]
        settings["MODEL.RESNETS.DEFORM_MODULATED"] = channels == 3 * 9
    return settings


def swin(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take a Swin Transformer ``backbone.*``, for torchvision's modules.

    Raises:
        UserError: a tensor that tells a shape is missing.
    """
    stages = [rf"backbone\.stages\.{stage}\." for stage in range(4)]
    table = r"blocks\.0\.attn\.w_msa\.relative_position_bias_table"
    settings = {
        "MODEL.BACKBONE.NAME": "build_swin_fpn_backbone",
        "MODEL.SWIN.IMPLEMENTATION": "torchvision",
        "MODEL.SWIN.EMBED_DIM": tensors.shape(r"backbone\.patch_embed\.projection\.weight")[0],
        "MODEL.SWIN.DEPTHS": [
            len(tensors.names(stage + r"blocks\.\d+\.norm1\.weight")) for stage in stages
        ],
        "MODEL.SWIN.NUM_HEADS": [tensors.shape(stage + table)[1] for stage in stages],
        # A row for each offset between two cells of a window, from -(size - 1) to size - 1 in x and y.
        "MODEL.SWIN.WINDOW_SIZE": (math.isqrt(tensors.shape(stages[0] + table)[0]) + 1) // 2,
    }
    converted = tensors.take(_swin_rules())
    for name, tensor in converted.items():
        if name.endswith(".relative_position_index"):
            converted[name] = tensor.flatten()
    for name, tensor in tensors.take(_swin_merging_rules()).items():
        converted[name] = _patches_outer(tensor)
    return converted, settings


def _swin_rules() -> Iterator[Tuple[str, str]]:
    yield r"backbone\.patch_embed\.projection\.(\w+)", _OURS + r"features.0.0.\1"
    yield r"backbone\.patch_embed\.norm\.(\w+)", _OURS + r"features.0.2.\1"
    for stage in range(4):
        theirs = rf"backbone\.stages\.{stage}\.blocks\.(\d+)\."
        ours = _OURS + rf"features.{2 * stage + 1}.\1."
        yield theirs + r"(norm[12]\.\w+)", ours + r"\2"
        yield theirs + r"attn\.w_msa\.((?:qkv\.|proj\.|relative_position_)\w+)", ours + r"attn.\2"
        yield theirs + r"ffn\.layers\.0\.0\.(\w+)", ours + r"mlp.0.\2"
        yield theirs + r"ffn\.layers\.1\.(\w+)", ours + r"mlp.3.\2"
        yield rf"backbone\.norm{stage}\.(\w+)", _OURS + rf"norms.res{stage + 2}.\1"


def _swin_merging_rules() -> Iterator[Tuple[str, str]]:
    for stage in range(3):
        theirs = rf"backbone\.stages\.{stage}\.downsample\.((?:norm|reduction)\.\w+)"
        yield theirs, _OURS + rf"features.{2 * stage + 2}.\1"


def _patches_outer(tensor: torch.Tensor) -> torch.Tensor:
    """Inputs (last dimension) of the patch merging: (channel, y, x) there, (x, y, channel) in torchvision."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(start_dim=-3)


def pyramid(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take the FPN ``neck.*``: P2 to P5 of a two-stage detector (P6 is max-pooled), P3 to P7 of the others.

    Raises:
        UserError: it has other levels.
    """
    found = tuple(
        len(tensors.names(rf"neck\.{convs}\.\d+\.conv\.weight"))
        for convs in ("lateral_convs", "fpn_convs")
    )
    expected = (4, 4) if two_stage else (3, 5)
    if found != expected:
        raise UserError(
            f"{tensors.source} has a pyramid with {found[0]} lateral and {found[1]} output convolutions; "
            f"this detector can be converted with {expected[0]} and {expected[1]}."
        )
    stages = _stages(two_stage)
    settings: Dict[str, Any] = {
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.FPN.OUT_CHANNELS": tensors.shape(r"neck\.lateral_convs\.0\.conv\.weight")[0],
        "MODEL.FPN.TOP_BLOCK": "MaxPool" if two_stage else "P6P7",
    }
    rules = []
    for index, stage in enumerate(stages):
        level = stage[len("res") :]
        rules.append((rf"neck\.lateral_convs\.{index}\.conv\.(\w+)", rf"backbone.fpn_lateral{level}.\1"))
        rules.append((rf"neck\.fpn_convs\.{index}\.conv\.(\w+)", rf"backbone.fpn_output{level}.\1"))
    if not two_stage:
        in_channels = tensors.shape(r"neck\.fpn_convs\.3\.conv\.weight")[1]
        on_output = in_channels == settings["MODEL.FPN.OUT_CHANNELS"]
        settings["MODEL.FPN.TOP_BLOCK_IN_FEATURE"] = "p5" if on_output else "res5"
        rules.append((r"neck\.fpn_convs\.3\.conv\.(\w+)", r"backbone.top_block.p6.\1"))
        rules.append((r"neck\.fpn_convs\.4\.conv\.(\w+)", r"backbone.top_block.p7.\1"))
    return tensors.take(rules), settings

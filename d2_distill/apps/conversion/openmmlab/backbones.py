"""ResNets, Res2Nets, Swin Transformers and feature pyramids: our names of their tensors, and what their shapes tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ....errors import UserError
from ... import conversion
from .. import Converted, Tensors

_OURS = "backbone.bottom_up."
# Blocks of each stage -> timm's name of the Res2Net v1d.
_RES2NETS = {(3, 4, 6, 3): "res2net50d", (3, 4, 23, 3): "res2net101d"}


def is_swin(tensors: Tensors) -> bool:
    return bool(tensors.names(r"backbone\.patch_embed\.projection\.weight"))


def resnet(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take a ResNet or ResNeXt ``backbone.*``; raises as :func:`d2_distill.apps.conversion.resnet`."""
    return conversion.resnet(tensors, two_stage=two_stage, prefix=r"backbone\.")


def is_res2net(tensors: Tensors) -> bool:
    return bool(tensors.names(r"backbone\.layer1\.0\.convs\.0\.weight"))


def res2net(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take a Res2Net v1d ``backbone.*``, with deformable convolutions or not, for timm's modules.

    Raises:
        UserError: it is another Res2Net than timm has.
    """
    stages = [rf"backbone\.layer{stage}\." for stage in range(1, 5)]
    blocks = tuple(len(tensors.names(stage + r"\d+\.conv1\.weight")) for stage in stages)
    scales = len(tensors.names(stages[0] + r"0\.convs\.\d+\.weight")) + 1
    width = tensors.shape(stages[0] + r"0\.convs\.0\.weight")[0]
    deep_stem = bool(tensors.names(r"backbone\.stem\.0\.weight"))
    if blocks not in _RES2NETS or (scales, width, deep_stem) != (4, 26, True):
        raise UserError(
            f"{tensors.source} has a Res2Net of {blocks} blocks, {width} channels and {scales} scales with a "
            f"{'deep' if deep_stem else 'plain'} stem; those of 26 channels, 4 scales and a deep stem (v1d), of depth "
            "50 and 101 can be converted."
        )
    offsets = [stage + r"0\.convs\.0\.conv_offset\.bias" for stage in stages]
    deformable = [bool(tensors.names(offset)) for offset in offsets]
    settings = {
        "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
        "MODEL.TIMM.NAME": _RES2NETS[blocks],
        "MODEL.TIMM.DEFORM_ON_PER_STAGE": deformable,
    }
    if any(deformable):  # x and y of 9 points; version 2 also a factor of each
        channels = tensors.shape(offsets[deformable.index(True)])[0]
        settings["MODEL.TIMM.DEFORM_MODULATED"] = channels == 3 * 9
    settings["MODEL.BACKBONE.FIXED_BN_STATISTICS"] = True  # as published
    return tensors.take(_res2net_rules()), settings


def _res2net_rules() -> Iterator[tuple[str, str]]:
    body = _OURS + "body."
    for index in (0, 1, 3, 4, 6):  # convolutions and norms of the stem; timm names its last norm as of plain stems
        yield rf"backbone\.stem\.{index}\.(\w+)", body + rf"conv1.{index}.\1"
    yield r"backbone\.stem\.7\.(\w+)", body + r"bn1.\1"
    yield r"backbone\.(layer[1-4]\..+)", body + r"\1"


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


def _swin_rules() -> Iterator[tuple[str, str]]:
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


def _swin_merging_rules() -> Iterator[tuple[str, str]]:
    for stage in range(3):
        theirs = rf"backbone\.stages\.{stage}\.downsample\.((?:norm|reduction)\.\w+)"
        yield theirs, _OURS + rf"features.{2 * stage + 2}.\1"


def _patches_outer(tensor: torch.Tensor) -> torch.Tensor:
    """Inputs (last dimension) of the patch merging: (channel, y, x) there, (x, y, channel) in torchvision."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(start_dim=-3)


def pyramid(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take the FPN ``neck.*``; raises as :func:`d2_distill.apps.conversion.pyramid`."""
    lateral, output = (rf"neck\.{convs}\.{{}}\.conv" for convs in ("lateral_convs", "fpn_convs"))
    return conversion.pyramid(
        tensors, two_stage=two_stage, lateral=lateral, output=output, top=(output.format(3), output.format(4))
    )

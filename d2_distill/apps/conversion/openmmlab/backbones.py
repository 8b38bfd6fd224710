"""ResNets, Swin Transformers and feature pyramids: our names of their tensors, and what their shapes tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ... import conversion
from .. import Converted, Tensors

_OURS = "backbone.bottom_up."


def is_swin(tensors: Tensors) -> bool:
    return bool(tensors.names(r"backbone\.patch_embed\.projection\.weight"))


def resnet(tensors: Tensors, *, two_stage: bool) -> Converted:
    """Take a ResNet or ResNeXt ``backbone.*``; raises as :func:`d2_distill.apps.conversion.resnet`."""
    return conversion.resnet(tensors, two_stage=two_stage, prefix=r"backbone\.")


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

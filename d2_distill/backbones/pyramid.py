"""FPN with its coarsest levels as the config says, on any bottom-up network with features res2 to res5."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError

TOP_BLOCKS = ("P6P7", "P6", "MaxPool", "")


@extend_config
def add_config(cfg: CfgNode) -> None:
    # The levels above P5 in the FPN builders of this package: "P6P7" (convolutions, for one-stage detectors), "P6" (the
    # first of them, for low-resolution ones), "MaxPool" (P6 for two-stage ones) or "".
    cfg.MODEL.FPN.TOP_BLOCK = "P6P7"
    # What P6 is convolved from, "p5" or "res5". RetinaNet: "res5"; FCOS: "p5".
    cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = "p5"
    # Whether there is a ReLU between P6 and P7. RetinaNet: True (Detectron2) or False (OpenMMLab); FCOS: True.
    cfg.MODEL.FPN.TOP_BLOCK_RELU = False


class LastLevelP6(nn.Module):
    """P6 alone, for pyramids of which nobody reads P7; its module is called as LastLevelP6P7's."""

    num_levels = 1

    def __init__(self, in_channels: int, out_channels: int, in_feature: str) -> None:
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        c2_xavier_fill(self.p6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, C, H, W) to P6 (N, C', H/2, W/2), sizes rounded up."""
        return [self.p6(x)]


class LinearP6P7(LastLevelP6P7):
    """P6 and P7 without the ReLU between them; modules and arguments are LastLevelP6P7's."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, C, H, W) to P6 (N, C', H/2, W/2) and P7 (N, C', H/4, W/4), sizes rounded up."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


def pyramid_features(cfg: CfgNode) -> list[str]:
    """``MODEL.FPN.IN_FEATURES``, the features that the pyramid stands on, fine to coarse.

    Raises:
        UserError: they are not consecutive stages up to "res5".
    """
    names = list(cfg.MODEL.FPN.IN_FEATURES)
    if not names or names != ["res2", "res3", "res4", "res5"][-len(names) :]:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {names}; it must end with 'res5', on which {cfg.MODEL.BACKBONE.NAME} puts P5 "
            "and the levels above, after the stages in front of it, such as ['res3', 'res4', 'res5']."
        )
    return names


def build_pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Detectron2's FPN of ``MODEL.FPN`` on ``bottom_up``, with levels above P5.

    ``MODEL.FPN.TOP_BLOCK`` "P6P7" adds 3x3 convolutions of stride 2: P6 stands on ``TOP_BLOCK_IN_FEATURE``,
    "p5" (the pyramid's own output) or "res5", and ``TOP_BLOCK_RELU`` puts a ReLU between P6 and P7. "P6" adds
    the first of them alone, "MaxPool" a P6 that is every second cell of P5, "" nothing.

    Raises:
        UserError: one of these keys has another value, or see :func:`pyramid_features`.
    """
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up,
        in_features=pyramid_features(cfg),
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=_build_top_block(node, bottom_up),
        fuse_type=node.FUSE_TYPE,
    )


def _build_top_block(node: CfgNode, bottom_up: Backbone) -> nn.Module | None:
    if node.TOP_BLOCK not in TOP_BLOCKS:
        known = ", ".join(TOP_BLOCKS[:-1])
        raise UserError(f"MODEL.FPN.TOP_BLOCK is {node.TOP_BLOCK!r}; choose one of {known}, or ''.")
    if node.TOP_BLOCK == "":
        return None
    if node.TOP_BLOCK == "MaxPool":
        return LastLevelMaxPool()
    channels = {"p5": node.OUT_CHANNELS, "res5": bottom_up.output_shape()["res5"].channels}
    if node.TOP_BLOCK_IN_FEATURE not in channels:
        raise UserError(
            f"MODEL.FPN.TOP_BLOCK_IN_FEATURE is {node.TOP_BLOCK_IN_FEATURE!r}; "
            f"choose one of {', '.join(channels)}."
        )
    if node.TOP_BLOCK == "P6":
        top_block_class = LastLevelP6
    else:
        top_block_class = LastLevelP6P7 if node.TOP_BLOCK_RELU else LinearP6P7
    return top_block_class(
        channels[node.TOP_BLOCK_IN_FEATURE], node.OUT_CHANNELS, in_feature=node.TOP_BLOCK_IN_FEATURE
    )

"""The head between pooled RoI features and the box predictor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from fvcore.nn import weight_init
from torch import nn

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
ROI_BOX_HEAD_REGISTRY.__doc__ = "Modules (cfg, input_shape) from pooled features to per-region vectors."


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions ``conv1``, ... then fully connected layers ``fc1``, ..., each followed by ReLU.

    Attributes:
        output_shape: channels of the result; height and width too if it ends with a convolution.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, conv_dims: Sequence[int], fc_dims: Sequence[int], conv_norm: str = ""
    ):
        """
        Args:
            input_shape: channels, height and width of a pooled region.
            conv_dims, fc_dims: output channels of every layer; at least one in all.
            conv_norm: normalisation of the convolutions, which then have no bias.
        """
        super().__init__()
        assert len(conv_dims) + len(fc_dims) > 0, "MODEL.ROI_BOX_HEAD needs NUM_CONV or NUM_FC above 0."
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        for i, dim in enumerate(conv_dims, start=1):
            self.add_module(f"conv{i}", Conv2d(
                channels, dim, kernel_size=3, padding=1, bias=not conv_norm, norm=get_norm(conv_norm, dim),
                activation=nn.ReLU()))
            channels = dim
        self.output_shape = ShapeSpec(channels=channels, height=height, width=width)
        if fc_dims:
            self.add_module("flatten", nn.Flatten())
            channels *= height * width
        for i, dim in enumerate(fc_dims, start=1):
            self.add_module(f"fc{i}", nn.Linear(channels, dim))
            self.add_module(f"fc_relu{i}", nn.ReLU())
            channels = dim
            self.output_shape = ShapeSpec(channels=dim)

        for layer in self:
            if isinstance(layer, nn.Conv2d):
                weight_init.c2_msra_fill(layer)
            elif isinstance(layer, nn.Linear):
                weight_init.c2_xavier_fill(layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "conv_dims": [head.CONV_DIM] * head.NUM_CONV,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """The box head named by MODEL.ROI_BOX_HEAD.NAME."""
    return ROI_BOX_HEAD_REGISTRY.get(cfg.MODEL.ROI_BOX_HEAD.NAME)(cfg, input_shape)

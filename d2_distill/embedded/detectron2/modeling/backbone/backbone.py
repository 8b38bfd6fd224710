"""Backbone, the interface of every feature extractor, its registry and builder."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = "Callables ``(cfg, input_shape: ShapeSpec) -> Backbone``."


class Backbone(nn.Module):
    """Maps an image batch (N, C, H, W) to ``{name: (N, C, H / stride, W / stride) tensor}``.

    Subclasses fill ``_out_feature_channels`` and ``_out_feature_strides``, both keyed by feature name in the
    order of the output, or override :meth:`output_shape`.
    """

    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @property
    def size_divisibility(self) -> int:
        """The input's height and width must be multiples of this; 0 where any size will do."""
        return 0

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output."""
        return {
            name: ShapeSpec(channels=channels, stride=self._out_feature_strides[name])
            for name, channels in self._out_feature_channels.items()
        }


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """The backbone named by MODEL.BACKBONE.NAME, for images with as many channels as MODEL.PIXEL_MEAN."""
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, input_shape)

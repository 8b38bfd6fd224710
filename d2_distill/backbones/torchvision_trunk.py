"""The trunk of a torchvision classifier as a Detectron2 backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..errors import UserError


class TorchvisionTrunk(Backbone):
    """Layers in a row, some of whose outputs are features.

    Modules are named as in torchvision (``features.0.0.weight``), so that its weights load. Layers behind the last
    feature wanted are dropped: they would be parameters without gradient.

    Args:
        features: the layers of torchvision's model that are called ``features``.
        stages: name of each stage -> number of layers up to its end; first "stem", then "res2", ...; resK is of
            stride 2**K.
        channels: channels of each stage but the stem.
        out_features: stages whose outputs are wanted, in their order.
    """

    def __init__(
        self,
        features: Sequence[nn.Module],
        *,
        stages: dict[str, int],
        channels: dict[str, int],
        out_features: Sequence[str],
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(features)[: stages[out_features[-1]]])
        self._stages = stages
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels[name] for name in self._out_features}
        self._out_feature_strides = {name: 2 ** int(name[len("res") :]) for name in self._out_features}

    def freeze(self, freeze_at: int) -> None:
        """Stop the training of the first stages, batch norms' statistics included, as ``MODEL.BACKBONE.FREEZE_AT``
        says: 1 is the stem, 2 the stem and res2, ..."""
        for layer in self.frozen_layers(freeze_at):
            layer.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(layer)

    def frozen_layers(self, freeze_at: int) -> nn.Sequential:
        """The layers of the first ``freeze_at`` stages."""
        ends = [0, *self._stages.values()]
        return self.features[: ends[: max(freeze_at, 0) + 1][-1]]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W) to features (N, C, H / stride, W / stride), by name."""
        wanted = {self._stages[name]: name for name in self._out_features}
        outputs = {}
        for number, layer in enumerate(self.features, start=1):
            x = layer(x)
            if number in wanted:
                outputs[wanted[number]] = self.feature(wanted[number], x)
        return outputs

    def feature(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) of what comes out of a stage."""
        return x


def require_three_channels(input_shape: ShapeSpec) -> None:
    """
    Raises:
        UserError: the images have another number of channels than torchvision's trunks read.
    """
    if input_shape.channels != 3:
        raise UserError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} entries, but torchvision's backbones read three channels; "
            "set INPUT.FORMAT to RGB, and three entries."
        )

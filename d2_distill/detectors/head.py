"""The heads of dense detectors: towers shared by all levels, and the layers that predict from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec, get_norm
from torch import nn

from ..layers.tower import Tower
from ..staged import Predictor


class Scale(nn.Module):
    """A learned factor, one a level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class DenseHead(nn.Module):
    """What a subclass names as its towers and predictors, run over all levels."""

    @property
    def towers(self) -> dict[str, Tower]:
        """Branch -> its tower."""
        raise NotImplementedError

    @property
    def predictors(self) -> dict[str, Predictor]:
        """Output name -> its predictor, in the order in which ``forward`` returns the outputs."""
        raise NotImplementedError

    def predict(self, output: str, features: Sequence[torch.Tensor], level: int) -> torch.Tensor:
        """Return an output's raw map (N, A * K, H, W) from what its predictor reads on a level, (N, C, H, W) each."""
        raise NotImplementedError

    def forward(self, features: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Maps (N, C, H, W), one a level, to raw maps of each output, one a level."""
        predictors, towers = self.predictors, self.towers
        reads = {read for predictor in predictors.values() for read in predictor.reads}
        wanted = {name: {tap for branch, tap in reads if branch == name} for name in towers}
        # Tower by tower and level by level, as the staged run does: norms that cycle over the levels count the calls.
        taps = {name: [tower.run_through(x, wanted[name]) for x in features] for name, tower in towers.items()}
        return [
            [
                self.predict(output, [taps[branch][level][tap] for branch, tap in predictor.reads], level)
                for level in range(len(features))
            ]
            for output, predictor in predictors.items()
        ]


class TowerHead(DenseHead):
    """RetinaNet's, FCOS's, ATSS's and GFL's head; modules are named as in Detectron2's RetinaNetHead.

    Args:
        input_shape: of each level; all have the same channels.
        num_scores: class scores of an anchor.
        box_dim: box outputs of an anchor.
        num_anchors: anchors of a cell.
        conv_dims: channels of each tower block.
        norm: norm of the tower blocks, a name or a function, see ``detectron2.layers.get_norm``.
        tower_bias: whether the tower's convolutions have a bias.
        predictor_bias: whether the layers of boxes and centerness have one; that of classes always has.
        prior_prob: class probability at initialisation (focal loss, arXiv 1708.02002).
        centerness_on: tower on which centerness is predicted, "cls" or "box"; None for no centerness.
        use_scale: whether each level has a learned factor on its box outputs.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_scores: int,
        box_dim: int,
        num_anchors: int = 1,
        conv_dims: list[int],
        norm="",
        tower_bias: bool = False,
        predictor_bias: bool = True,
        prior_prob: float = 0.01,
        centerness_on: str | None = None,
        use_scale: bool = True,
    ) -> None:
        super().__init__()
        in_channels = input_shape[0].channels
        self.cls_subnet = build_tower(in_channels, conv_dims, norm, tower_bias)
        self.bbox_subnet = build_tower(in_channels, conv_dims, norm, tower_bias)
        channels = conv_dims[-1] if conv_dims else in_channels
        self.cls_score = nn.Conv2d(channels, num_anchors * num_scores, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * box_dim, 3, padding=1, bias=predictor_bias)
        self.centerness_on = centerness_on
        if centerness_on:
            self.ctrness = nn.Conv2d(channels, num_anchors, 3, padding=1, bias=predictor_bias)
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @property
    def towers(self) -> dict[str, Tower]:
        return {"cls": Tower(self.cls_subnet), "box": Tower(self.bbox_subnet)}

    @property
    def predictors(self) -> dict[str, Predictor]:
        return predictors_at_ends(self.towers, self._layers)

    @property
    def _layers(self) -> dict[str, tuple[str, nn.Module]]:
        """Output name -> (branch, layer)."""
        layers = {"logits": ("cls", self.cls_score), "deltas": ("box", self.bbox_pred)}
        if self.centerness_on:
            layers["centerness"] = (self.centerness_on, self.ctrness)
        return layers

    def predict(self, output: str, features: Sequence[torch.Tensor], level: int) -> torch.Tensor:
        _, layer = self._layers[output]
        x = layer(*features)
        return self.scales[level](x) if output == "deltas" and self.scales is not None else x


def predictors_at_ends(
    towers: Mapping[str, Tower], layers: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, Predictor]:
    """Return predictors that each read the end of one tower.

    Args:
        layers: output name -> (branch, layer).
    """
    return {
        output: Predictor(((branch, towers[branch].end),), layer) for output, (branch, layer) in layers.items()
    }


class QualityHead(TowerHead):
    """GFLv2's head: the class scores are multiplied by a quality that is read off the box distributions.

    Args:
        reg_max: last bin of each edge's distribution.
        quality_topk: highest probabilities of each edge that the quality sees, besides their mean.
        quality_channels: hidden channels.
        kwargs: of :class:`TowerHead`.
    """

    def __init__(self, *, reg_max: int, quality_topk: int, quality_channels: int, **kwargs) -> None:
        super().__init__(box_dim=4 * (reg_max + 1), **kwargs)
        self.reg_max = reg_max
        self.quality_topk = quality_topk
        self.reg_conf = nn.Sequential(
            nn.Linear(4 * (quality_topk + 1), quality_channels), nn.ReLU(), nn.Linear(quality_channels, 1)
        )
        for layer in (self.reg_conf[0], self.reg_conf[2]):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def quality(self, deltas: torch.Tensor) -> torch.Tensor:
        """Box logits (..., 4 * (reg_max + 1)) to qualities (..., 1); gradient flows to the boxes."""
        probabilities = deltas.unflatten(-1, (4, self.reg_max + 1)).softmax(dim=-1)
        highest = probabilities.topk(self.quality_topk, dim=-1).values
        statistics = torch.cat([highest, highest.mean(dim=-1, keepdim=True)], dim=-1)
        return self.reg_conf(statistics.flatten(start_dim=-2)).sigmoid()


def build_tower(in_channels: int, conv_dims: list[int], norm, bias: bool) -> nn.Sequential:
    """Return blocks of a 3x3 convolution, a norm ("" for none) and a ReLU, one for each of ``conv_dims``."""
    layers: list[nn.Module] = []
    for out_channels in conv_dims:
        layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias))
        if norm:
            layers.append(get_norm(norm, out_channels))
        layers.append(nn.ReLU())
        in_channels = out_channels
    return nn.Sequential(*layers)

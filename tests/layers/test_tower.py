"""Towers: blocks by their convolutions, whatever ends them, and the places between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.layers.tower import Tap, Tower

ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.1), nn.SiLU(), nn.GELU(), nn.PReLU(), nn.Hardswish()]


def _layers(activation: nn.Module, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (6, 8):
        layers += [nn.Conv2d(4 if channels == 6 else 6, channels, 3, padding=1)]
        layers += [nn.GroupNorm(2, channels)] * norm + [activation]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda layer: type(layer).__name__)
def test_blocks_end_in_any_activation(activation, norm):
    layers, x = _layers(activation, norm), torch.rand(1, 4, 5, 5) - 0.5
    tower, per_block = Tower(layers), 2 + norm
    assert len(tower) == 2 and tower.end == Tap(2) and [tower.out_channels(k) for k in (1, 2)] == [6, 8]
    depths = {Tap(0): 0, Tap(1, False): per_block - 1, Tap(1): per_block, Tap(2, False): 2 * per_block - 1, Tap(2): 2 * per_block}
    found = tower.run_through(x, depths)
    assert set(found) == set(depths)
    for tap, depth in depths.items():
        assert torch.equal(found[tap], layers[:depth](x)) and torch.equal(tower.run(found[tap], tap), layers(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda layer: type(layer).__name__)
def test_only_a_relu_acts_again_on_a_changed_feature(activation):
    tower = Tower(_layers(activation))
    assert tower.resumed(Tap(1)) == Tap(1, activated=not isinstance(activation, nn.ReLU))
    assert tower.resumed(Tap(0)) == Tap(0) and tower.resumed(Tap(2, False)) == Tap(2, False)


def test_an_empty_tower_is_the_map_itself():
    tower, x = Tower(nn.Sequential()), torch.rand(1, 4, 2, 2)
    assert len(tower) == 0 and tower.end == Tap(0) and tower.run(x) is x and tower.resumed(Tap(0)) == Tap(0)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)],
        [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()],
        [nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()],
    ],
)
def test_other_layers_are_refused(layers):
    with pytest.raises(ValueError, match="begin with a convolution and end in an activation"):
        Tower(nn.Sequential(*layers))

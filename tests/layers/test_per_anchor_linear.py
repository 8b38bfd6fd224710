"""The per-anchor linear layer against one linear layer an anchor, row by row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.layers.per_anchor_linear import PerAnchorLinear

IN_DIM, OUT_DIM = 5, 7


def slow(layer: PerAnchorLinear, x: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, anchor in zip(x.double(), anchors.tolist()):
        block = slice(anchor * OUT_DIM, (anchor + 1) * OUT_DIM)
        rows.append(layer.weight[block].double() @ row + layer.bias[block].double())
    return torch.stack(rows)


@pytest.mark.parametrize("num_anchors", [1, 3, 9])
def test_each_row_goes_through_the_layer_of_its_anchor(num_anchors):
    torch.manual_seed(0)
    layer = PerAnchorLinear(IN_DIM, OUT_DIM, num_anchors)
    x = torch.randn(40, IN_DIM, requires_grad=True)
    anchors = torch.randint(num_anchors, (40,))
    wanted = [x, layer.weight, layer.bias]
    outputs, factors = layer(x, anchors), torch.randn(40, OUT_DIM)
    expected = slow(layer, x, anchors)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((outputs * factors).sum(), wanted)
    for ours, theirs in zip(found, torch.autograd.grad((expected * factors).sum(), wanted)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_with_one_anchor_it_is_a_linear_layer_for_all():
    layer, plain = PerAnchorLinear(IN_DIM, OUT_DIM, 1), nn.Linear(IN_DIM, OUT_DIM)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, IN_DIM)
    assert torch.equal(layer(x, torch.tensor([0, 8, 3, 0])), plain(x))


def test_anchors_without_a_row_get_no_gradient_but_zero():
    layer = PerAnchorLinear(IN_DIM, OUT_DIM, 3)
    layer(torch.randn(4, IN_DIM), torch.tensor([0, 2, 2, 0])).sum().backward()
    for gradient in (layer.weight.grad, layer.bias.grad):
        of_anchor = gradient.unflatten(0, (3, OUT_DIM)).flatten(start_dim=1).any(dim=1)
        assert of_anchor.tolist() == [True, False, True]


def test_no_rows():
    layer = PerAnchorLinear(IN_DIM, OUT_DIM, 3)
    outputs = layer(torch.zeros(0, IN_DIM), torch.zeros(0, dtype=torch.int64))
    assert outputs.shape == (0, OUT_DIM)
    outputs.sum().backward()
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_starts_as_pytorchs_linear_layer():
    torch.manual_seed(3)
    layer = PerAnchorLinear(IN_DIM, OUT_DIM, 2)
    torch.manual_seed(3)
    plain = nn.Linear(IN_DIM, 2 * OUT_DIM)
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)

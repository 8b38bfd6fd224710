"""Parameters and multiply-adds of a model small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.evaluation.complexity import count_flops, count_parameters, flops_by_module
from d2_distill.layers.deformable import DeformableConv2d


class Counted(nn.Module):
    """One convolution and one linear layer, in Detectron2's calling convention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5, bias=False)

    def forward(self, batched_inputs):
        images = torch.stack([inputs["image"] for inputs in batched_inputs])
        return self.linear(self.norm(self.conv(images)).mean(dim=(2, 3)))


def test_counts_by_hand():
    model = Counted()
    model.conv.weight.requires_grad_(False)
    assert count_parameters(model) == (3 * 4 * 9 + 4) + (4 + 4) + 4 * 5
    inputs = [{"image": torch.zeros(3, 8, 10)}] * 2
    assert count_flops(model, inputs) == 2 * (8 * 10 * 3 * 4 * 9 + 4 * 5)


def test_modules_are_counted_by_name():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(2, 5, 1)))
    counts = flops_by_module(model, torch.zeros(1, 3, 4, 6))
    assert counts == {"0": 24 * 6, "2": 24 * 10, "2.0": 24 * 10, "": 24 * 16}
    assert flops_by_module(nn.ReLU(), torch.zeros(1)) == {"": 0}


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = Counted().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, [{"image": torch.ones(3, 8, 8)}])
    with pytest.raises(KeyError):
        count_flops(model, [{}])
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolutions_count_as_plain_ones(modulated):
    """And the convolution of their offsets."""
    conv = DeformableConv2d(4, 6, 3, padding=1, groups=2, modulated=modulated)
    offsets = 9 * (3 if modulated else 2)
    assert flops_by_module(conv, torch.zeros(1, 4, 5, 7))[""] == 35 * 9 * (6 * 2 + offsets * 4)

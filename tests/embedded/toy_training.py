"""A model of one number and its trainer."""

from __future__ import annotations

import torch
from detectron2.engine import SimpleTrainer
from torch import nn


class Regression(nn.Module):
    """One weight; the loss of a number x is weight * x, split in two terms."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return {"loss_a": self.weight * x, "loss_b": 2 * self.weight * x}


def simple_trainer(model=None, data=None, lr=0.1):
    model = Regression() if model is None else model
    return SimpleTrainer(model, [1.0] * 100 if data is None else data,
                         torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))

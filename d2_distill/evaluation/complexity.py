"""Size and cost of a model: its parameters, and its multiply-adds on given inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters, frozen ones included; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, batched_inputs: list[dict[str, Any]]) -> int:
    """Multiply-adds of the convolutions and linear layers when the model detects in the given images.

    One multiply-add counts as one, as in Detectron2 and in papers on detection; PyTorch counts two.
    The number of a two-stage model depends on how many proposals survive in these images.

    Args:
        batched_inputs: what a Detectron2 model takes, dicts with an ``"image"`` of shape (C, H, W).
    """
    return flops_by_module(model, batched_inputs)[""]


def flops_by_module(model: nn.Module, batched_inputs: list[dict[str, Any]]) -> dict[str, int]:
    """:func:`count_flops` of each module that has any, by its dotted name; of the whole model by ""."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(batched_inputs)
    finally:
        model.train(was_training)
    # The counter's names begin with the class of the model; what its modules share is "Global".
    root = type(model).__name__ + "."
    flops = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    parts = {name[len(root) :]: count for name, count in flops.items() if name.startswith(root)}
    return {**parts, "": counter.get_total_flops() // 2}

"""Size and cost of a model: its parameters, and its multiply-adds on given inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  registers its operators
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def _deformable_flops(x: Sequence[int], weight: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
    """Of the convolution alone, as of a plain one; reading between the cells is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which also counts deformable convolutions."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable_flops})


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
        with torch.no_grad(), flop_counter() as counter:
            model(batched_inputs)
    finally:
        model.train(was_training)
    # The counter's names begin with the class of the model; what its modules share is "Global".
    root = type(model).__name__ + "."
    flops = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    parts = {name[len(root) :]: count for name, count in flops.items() if name.startswith(root)}
    return {**parts, "": counter.get_total_flops() // 2}

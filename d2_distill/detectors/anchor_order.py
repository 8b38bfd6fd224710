"""Order of the anchors of a cell: Detectron2's is size-outer, OpenMMLab's heads are ratio-outer."""

from __future__ import annotations

import torch


def to_size_outer(tensor: torch.Tensor, num_sizes: int, num_ratios: int, dim: int = 0) -> torch.Tensor:
    """Reorder blocks of anchors from (ratio, size) to Detectron2's (size, ratio).

    For an OpenMMLab head's last convolutions (``dim`` 0), weights and biases, and its prediction maps (1).

    Args:
        tensor: at ``dim``, num_ratios * num_sizes blocks of equal length, such as an anchor's classes.

    Returns:
        Tensor of the same shape.
    """
    blocks = tensor.unflatten(dim, (num_ratios, num_sizes, -1))
    return blocks.transpose(dim, dim + 1).flatten(dim, dim + 2)

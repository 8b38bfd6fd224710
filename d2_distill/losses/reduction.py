"""Reduction of element-wise losses."""

from __future__ import annotations

import torch
import torch.distributed as dist

EPS = torch.finfo(torch.float32).eps


def weighted_mean(
    loss: torch.Tensor, weight: torch.Tensor | None, normalizer: float | torch.Tensor
) -> torch.Tensor:
    """sum(loss * weight) / (normalizer + eps) as in OpenMMLab's losses; eps is float32's (1.19e-07).

    Args:
        loss: element-wise loss of any shape; an empty one gives 0 and keeps its graph.
        weight: broadcastable to ``loss`` ((M, 1) for one weight a row of an (M, K) loss), None for all ones.
        normalizer: a positive number, for example the number of positive anchors in the batch.
    """
    if weight is not None:
        loss = loss * weight
    return loss.sum() / (normalizer + EPS)


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Average of a tensor over all processes, without gradient; one process gets its own values back.

    With a normalizer averaged so, DDP's mean of the gradients is the gradient of one large batch. Every
    process has to call it. Several processes turn integers into floating-point numbers.
    """
    value = value.detach()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()

"""Reduction of element-wise losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    if count_processes() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count_processes()


def count_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Batch:
    """The images that normalizers and statistics are taken over.

    With those of all processes, DDP's mean of the gradients is the gradient of one large batch. Every process has to
    make the same calls in the same order. With one process both kinds give the same bits.

    Attributes:
        is_shared: the images of all processes, or those of this process only.
    """

    is_shared: bool = False

    @property
    def is_split(self) -> bool:
        """Whether other processes hold a part of the images."""
        return self.is_shared and count_processes() > 1

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor's average over the processes that hold the images, without gradient."""
        return mean_over_processes(value) if self.is_shared else value.detach()

    def at_least_one(self, mean: torch.Tensor) -> torch.Tensor:
        """Return averaged counts (:meth:`mean`), of which those whose total is 0 are as if it were 1."""
        return mean.clamp(min=1 / count_processes() if self.is_split else 1)

    def sizes(self, values: Sequence[int], like: torch.Tensor) -> Sequence[int] | torch.Tensor:
        """Return averaged counts, at least one, of what the host can count.

        Args:
            values: counts of this process.
            like: a tensor on the device on which processes meet.
        """
        if not self.is_split:
            return [max(value, 1) for value in values]
        return self.at_least_one(self.mean(torch.tensor(values, dtype=torch.float32).to(like.device)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes that hold the images; its gradient reaches each of them."""
        return _Sum.apply(values) if self.is_split else values


class _Sum(torch.autograd.Function):
    """Sum over processes; each gets the gradients of all, as all read the sum."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total

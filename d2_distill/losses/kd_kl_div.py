"""Mimicking of discrete distributions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kd_kl_div_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, class_reduction: str = "sum"
) -> torch.Tensor:
    """KL(softmax(teacher_logits / T) || softmax(logits / T)) * T**2 of each row (arXiv 1503.02531).

    Args:
        logits, teacher_logits: (..., C), such as the C bins of one side of a box. No gradient to the teacher.
        temperature: T, softens both distributions.
        class_reduction: "sum" over the C entries gives the divergence itself, "mean" divides it by C.

    Returns:
        (...) tensor.

    Raises:
        ValueError: ``class_reduction`` has another value.
    """
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"class_reduction is {class_reduction!r}; it must be 'sum' or 'mean'")
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=-1),
        reduction="none",
        log_target=True,
    )
    divergence = divergence.sum(dim=-1) if class_reduction == "sum" else divergence.mean(dim=-1)
    return divergence * temperature**2

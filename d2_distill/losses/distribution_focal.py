"""Training of discrete distributions towards real numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distribution_focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the two bins next to y, weighted by their closeness (DFL, arXiv 2006.04388, eq. 6).

    Args:
        logits: (..., n + 1), the bins 0..n.
        targets: (...), y in [0, n): the upper bin must exist, so callers clamp y to n - 0.1 as published.

    Returns:
        (...) tensor.
    """
    lower = targets.floor()
    bins = torch.stack([lower, lower + 1], dim=-1).long()
    log_probabilities = F.log_softmax(logits, dim=-1).gather(-1, bins)
    fraction = targets - lower
    return -(log_probabilities[..., 0] * (1 - fraction) + log_probabilities[..., 1] * fraction)

"""The focal loss of a batch's class logits (Lin et al., arXiv 1708.02002, eq. 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def focal_loss_sum(
    logits: torch.Tensor,
    positives: tuple[torch.Tensor, ...],
    valid: torch.Tensor,
    *,
    alpha: float,
    gamma: float,
) -> torch.Tensor:
    """Return the sum of the focal loss over all anchors and classes, a scalar.

    Nearly all targets are background, so the few positive entries are added as a correction: there is no one-hot
    target, and the host does not wait for the number of valid anchors.

    Args:
        logits: (N, R, K).
        positives: image, anchor and class index of the M entries whose target is 1, (M,) each.
        valid: (N, R) bool, the anchors that count.
        alpha: weight of positive entries, 1 - alpha that of the others; below 0 both weigh 1.
        gamma: exponent of the modulation.
    """
    positive_weight, negative_weight = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    as_background = logits.sigmoid().pow(gamma) * F.softplus(logits)
    of_positives = logits[positives]
    probabilities = of_positives.sigmoid()
    correction = positive_weight * (1 - probabilities).pow(gamma) * F.softplus(-of_positives)
    correction = correction - negative_weight * probabilities.pow(gamma) * F.softplus(of_positives)
    return negative_weight * (as_background.sum(dim=-1) * valid).sum() + correction.sum()

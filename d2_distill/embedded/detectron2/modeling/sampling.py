"""subsample_labels: the random choice of anchors or proposals that take part in a loss."""

from __future__ import annotations

import torch


def subsample_labels(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose at most ``num_samples`` labels, at most ``positive_fraction`` of them positive.

    Args:
        labels: (N,) of -1 (never chosen), ``bg_label`` (negative) and others (positive).

    Returns:
        indices of the chosen positives and of the chosen negatives, which fill up to ``num_samples``.
    """
    positive = ((labels != -1) & (labels != bg_label)).nonzero(as_tuple=True)[0]
    negative = (labels == bg_label).nonzero(as_tuple=True)[0]
    num_pos = min(len(positive), int(num_samples * positive_fraction))
    num_neg = min(len(negative), num_samples - num_pos)
    # positives are drawn first: equal seeds then give equal samples
    chosen_pos = torch.randperm(len(positive), device=labels.device)[:num_pos]
    chosen_neg = torch.randperm(len(negative), device=labels.device)[:num_neg]
    return positive[chosen_pos], negative[chosen_neg]

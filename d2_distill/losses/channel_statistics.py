"""Per-channel statistics of feature maps, shared by the alignment and the Pearson loss."""

from __future__ import annotations

from typing import Tuple

import torch

EPS = 1e-6  # added to the standard deviation (not to the variance), as published


def channel_statistics(features: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation of each channel over images and locations, at least in float32.

    A single value a channel (one image, a 1x1 map) has no unbiased deviation, and the reference gives nan
    there: its deviation is 0 here, as for any other constant channel.

    Args:
        features: (N, C, H, W).

    Returns:
        Mean and standard deviation, each (1, C, 1, 1).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    single = features[:, 0].numel() == 1
    deviation, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0 if single else 1, keepdim=True)
    return mean, deviation


def standardize(features: torch.Tensor) -> torch.Tensor:
    """(features - mean) / (std + 1e-6) a channel; the gradient flows through both statistics."""
    mean, deviation = channel_statistics(features)
    return (features - mean) / (deviation + EPS)

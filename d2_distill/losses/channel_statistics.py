"""Per-channel statistics of feature maps, shared by the alignment and the Pearson loss.

PyTorch's own ``std_mean`` over images and locations is ten times slower on the CPU, as long as a convolution.
"""

from __future__ import annotations

import torch

EPS = 1e-6  # added to the standard deviation (not to the variance), as published
IMAGES_AND_LOCATIONS = (0, 2, 3)


def center(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's mean over images and locations, (1, C, 1, 1), and features (N, C, H, W) without it.

    At least in float32.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = features.mean(dim=IMAGES_AND_LOCATIONS, keepdim=True)
    return mean, features - mean


def deviation(centered: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of each channel of centered features: (N, C, H, W) to (1, C, 1, 1).

    A single value a channel (one image, a 1x1 map) has no unbiased deviation, and the reference gives nan
    there: its deviation is 0 here, as for any other constant channel.
    """
    degrees = max(centered[:, 0].numel() - 1, 1)
    variance = centered.square().sum(dim=IMAGES_AND_LOCATIONS, keepdim=True) / degrees
    # The root's gradient is infinite at 0; so small a bound does not matter beside EPS.
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


def standardize(features: torch.Tensor) -> torch.Tensor:
    """(features - mean) / (std + 1e-6) a channel; the gradient flows through both statistics."""
    _, centered = center(features)
    return centered / (deviation(centered) + EPS)

"""Per-channel statistics of feature maps, shared by the alignment and the Pearson loss.

PyTorch's own ``std_mean`` over images and locations is ten times slower on the CPU, as long as a convolution.
"""

from __future__ import annotations

import torch

from .reduction import Batch

EPS = 1e-6  # added to the standard deviation (not to the variance), as published
IMAGES_AND_LOCATIONS = (0, 2, 3)
OWN = Batch()


def center(features: torch.Tensor, batch: Batch = OWN) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each channel's mean over images and locations, (1, C, 1, 1), and features (N, C, H, W) without it.

    Both are at least float32. ``batch`` says whose images the mean is taken over.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if batch.is_split:
        count = batch.sum(features.new_tensor(features[:, 0].numel()))
        mean = batch.sum(features.sum(dim=IMAGES_AND_LOCATIONS, keepdim=True)) / count
    else:
        mean = features.mean(dim=IMAGES_AND_LOCATIONS, keepdim=True)
    return mean, features - mean


def deviation(centered: torch.Tensor, batch: Batch = OWN) -> torch.Tensor:
    """Return the unbiased standard deviation of each channel of centered features: (N, C, H, W) to (1, C, 1, 1).

    A single value a channel (one image, a 1x1 map) has no unbiased deviation, and the reference gives nan
    there: its deviation is 0 here, as for any other constant channel.
    """
    count = centered[:, 0].numel()
    degrees = (batch.sum(centered.new_tensor(count)) - 1).clamp(min=1) if batch.is_split else max(count - 1, 1)
    variance = batch.sum(centered.square().sum(dim=IMAGES_AND_LOCATIONS, keepdim=True)) / degrees
    # The root's gradient is infinite at 0; so small a bound does not matter beside EPS.
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


def standardize(features: torch.Tensor, batch: Batch = OWN) -> torch.Tensor:
    """Return (features - mean) / (std + 1e-6) a channel; the gradient flows through both statistics."""
    _, centered = center(features, batch)
    return centered / (deviation(centered, batch) + EPS)

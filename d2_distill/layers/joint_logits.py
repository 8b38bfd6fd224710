"""The logit of the geometric mean of two probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def joint_logits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return z with sigmoid(z) = sqrt(sigmoid(a) * sigmoid(b)), in float32.

    With h = (softplus(-a) + softplus(-b)) / 2, so that the mean is exp(-h), z is -log(exp(h) - 1). That equals the sum
    below, in which nothing overflows and no digits of a mean near 1 are lost.

    Args:
        a, b: logits of any shapes that broadcast.
    """
    a, b = a.float(), b.float()
    return F.softplus((F.softplus(-a) + F.softplus(-b)) / 2) + a - F.softplus(F.softplus(a) - b)

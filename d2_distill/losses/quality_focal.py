"""Classification losses whose targets are qualities between 0 and 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def quality_focal_loss(
    predictions: torch.Tensor, targets: torch.Tensor, beta: float = 2.0, *, from_logits: bool = True
) -> torch.Tensor:
    """BCE(p, y) * |p - y| ** beta of each entry (quality focal loss, Li et al., arXiv 2006.04388).

    As published, y is the predicted box's IoU at the class of a positive and 0 elsewhere. With a teacher's
    probabilities for y it is CrossKD's classification loss (arXiv 2306.11369). The modulating factor carries
    gradient; the loss is 0 where p = y.

    Args:
        predictions: logits of p, or p itself.
        targets: y in [0, 1], same shape; detached by the caller.
        beta: exponent of the modulating factor, >= 1 (below, the gradient is infinite where p = y).
        from_logits: whether ``predictions`` are logits (GFLv2's joint scores are not).

    Returns:
        Tensor of the same shape.
    """
    if from_logits:
        # Binary cross entropy, in a form that is faster on the CPU than PyTorch's own function.
        cross_entropy = F.softplus(predictions).addcmul_(predictions, targets, value=-1)
        difference = predictions.sigmoid() - targets
    else:
        # PyTorch's own function raises an error for a nan, and wherever autocast is on in CUDA.
        cross_entropy = -targets * _log(predictions) - (1 - targets) * _log(1 - predictions)
        difference = predictions - targets
    if beta == 2:
        return cross_entropy * difference.square()
    modulation = difference.abs()
    return cross_entropy * (modulation if beta == 1 else modulation.pow(beta))


def _log(x: torch.Tensor) -> torch.Tensor:
    """log(x); -100 at 0, as in PyTorch's binary cross entropy, and no gradient there."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x < tiny, -100.0, x.clamp(min=tiny).log())

"""Alignment of a student's features with a teacher's statistics."""

from __future__ import annotations

import torch

from .channel_statistics import EPS, OWN, center, deviation
from .reduction import Batch


def align_statistics(student: torch.Tensor, teacher: torch.Tensor, batch: Batch = OWN) -> torch.Tensor:
    """Return the student's features with each channel's mean and deviation replaced by the teacher's.

    Before a student's tensor enters the teacher's layers it is re-standardised; statistics are pooled over
    the images of the batch and all locations, padding included (CrossKD, arXiv 2306.11369). No gradient to the teacher. A constant student channel becomes the teacher's mean, and its
    gradient is scaled by up to 1e6.

    Args:
        student: (N, C, H, W).
        teacher: (N', C, H', W'); only its statistics are used.
        batch: whose images the statistics are pooled over; the released code takes those of a process.

    Returns:
        (N, C, H, W), float32 for half-precision input.
    """
    _, ours = center(student, batch)
    mean, theirs = center(teacher.detach(), batch)
    return torch.addcmul(mean, ours, deviation(theirs, batch) / (deviation(ours, batch) + EPS))

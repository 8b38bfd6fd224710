"""Alignment of a student's features with a teacher's statistics."""

from __future__ import annotations

import torch

from .channel_statistics import EPS, center, deviation


def align_statistics(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Student's features with each channel's mean and deviation replaced by the teacher's.

    Before a student's tensor enters the teacher's layers it is re-standardised; statistics are pooled over
    the images of this process and all locations, padding included (CrossKD's released code, arXiv
    2306.11369). No gradient to the teacher. A constant student channel becomes the teacher's mean, and its
    gradient is scaled by up to 1e6.

    Args:
        student: (N, C, H, W).
        teacher: (N', C, H', W'); only its statistics are used.

    Returns:
        (N, C, H, W), float32 for half-precision input.
    """
    _, ours = center(student)
    mean, theirs = center(teacher.detach())
    return torch.addcmul(mean, ours, deviation(theirs) / (deviation(ours) + EPS))

"""Imitation of feature maps up to scale and shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .channel_statistics import OWN, standardize
from .reduction import Batch


def pearson_loss(
    student: torch.Tensor, teacher: torch.Tensor, resize: str | None = None, batch: Batch = OWN
) -> torch.Tensor:
    """Return half the mean squared difference of the maps, each standardised per channel over images and locations.

    With n = N*H*W it equals (n - 1) / n * (1 - Pearson's r) averaged over channels (PKD, arXiv 2207.02039).
    No gradient to the teacher. One value a channel (n = 1) carries no correlation: the loss is 0 there,
    where the reference has nan.

    Args:
        student, teacher: (N, C, H, W); heights and widths may differ if ``resize`` is given.
        resize: which map is resized bilinearly to the other's size where the sizes differ: "student" (as
            published), "teacher", or None to refuse.
        batch: whose images the maps are standardized over; published code takes those of a process.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes differ in a way that ``resize`` does not bridge.
    """
    if student.shape[-2:] != teacher.shape[-2:]:
        if resize == "student":
            student = F.interpolate(student, size=teacher.shape[-2:], mode="bilinear", align_corners=False)
        elif resize == "teacher":
            teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)} differ in shape"
        )
    return F.mse_loss(standardize(student, batch), standardize(teacher.detach(), batch)) / 2

"""What a detector's assigner found for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

# What an assigner says of an anchor that answers for no box.
BACKGROUND = -1
IGNORED = -2


@dataclass(frozen=True)
class Match:
    """What an assigner returns.

    Attributes:
        boxes: (N, R) int64, index of the ground-truth box that each anchor answers for, BACKGROUND or IGNORED.
        scores: (N, R) class score that each positive anchor should reach; None for hard targets.
        thresholds: (N, G) IoU from which on a candidate of a box is positive; None if there is no such number.
    """

    boxes: torch.Tensor
    scores: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None


@dataclass(frozen=True)
class Assignment:
    """Targets of a batch of dense predictions, R anchors over all levels.

    Attributes:
        labels: (N, R) class index; ``num_classes`` = background, -1 = no classification loss.
        boxes: (N, R, 4) XYXY box matched to each anchor; meaningful where the label is a foreground class.
        num_classes: number of foreground classes.
        scores, thresholds: see :class:`Match`.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    num_classes: int
    scores: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None

    @cached_property
    def valid(self) -> torch.Tensor:
        """(N, R) bool: anchors that take part in classification."""
        return self.labels >= 0

    @cached_property
    def foreground(self) -> torch.Tensor:
        """(N, R) bool: positive anchors."""
        return self.valid & (self.labels < self.num_classes)

    @cached_property
    def positives(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and anchor index of the M positive anchors, (M,) each. On a GPU the host waits for M, once."""
        return self.foreground.nonzero(as_tuple=True)

    @cached_property
    def normalizer(self) -> torch.Tensor:
        """Number of positive anchors of the batch, where an image without any counts as one (OpenMMLab's)."""
        return self.foreground.sum(dim=1).clamp(min=1).sum()

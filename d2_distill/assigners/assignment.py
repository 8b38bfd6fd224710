"""What a detector's assigner found for a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Assignment:
    """Targets of a batch of dense predictions, R locations x anchors over all levels.

    Attributes:
        labels: (N, R) class index; ``num_classes`` = background, -1 = no classification loss.
        boxes: (N, R, 4) XYXY box matched to each anchor; meaningful where the label is a foreground class.
        num_classes: number of foreground classes.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    num_classes: int

    @property
    def valid(self) -> torch.Tensor:
        """(N, R) bool: anchors that take part in classification."""
        return self.labels >= 0

    @property
    def foreground(self) -> torch.Tensor:
        """(N, R) bool: positive anchors."""
        return self.valid & (self.labels < self.num_classes)

    @property
    def normalizer(self) -> torch.Tensor:
        """Number of positive anchors of the batch, where an image without any counts as one (OpenMMLab's)."""
        return self.foreground.sum(dim=1).clamp(min=1).sum()

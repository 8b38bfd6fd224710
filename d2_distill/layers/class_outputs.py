"""Cut a layer's outputs down to some of its classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def keep_outputs(layer: nn.Module, rows: Sequence[int]) -> None:
    """Keep these outputs of a convolution or linear layer, in this order."""
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        if values is not None:
            setattr(layer, name, nn.Parameter(values.detach()[list(rows)]))
    for name in ("out_channels", "out_features"):
        if hasattr(layer, name):
            setattr(layer, name, len(rows))


class ClassScores(nn.Module):
    """Linear layer to some of the classes of a softmax, and the background, last, which takes the others in.

    The probabilities of the classes that are kept stay what they were, as those of all others add to the background's.
    Plain slicing would hand them to the classes that are kept: a truck would become a car where there is no truck.
    ``weight`` and ``bias`` are those of a plain layer of these classes, to be inherited.

    Args:
        layer: of all K classes and, last, the background.
        classes: that are kept.
    """

    def __init__(self, layer: nn.Linear, classes: Sequence[int]) -> None:
        super().__init__()
        background = layer.out_features - 1
        kept = [*classes, background]
        others = [index for index in range(background) if index not in set(classes)]
        self.weight, self.bias, self.other_weight, self.other_bias = (
            nn.Parameter(values.detach()[rows]) for rows in (kept, others) for values in (layer.weight, layer.bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (R, D) to logits (R, kept classes + 1)."""
        logits = F.linear(x, self.weight, self.bias)
        others = F.linear(x, self.other_weight, self.other_bias)
        background = torch.cat([logits[:, -1:], others], dim=1).logsumexp(dim=1, keepdim=True)
        return torch.cat([logits[:, :-1], background], dim=1)

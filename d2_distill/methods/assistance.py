"""What the settings of HEAD share: each has an assistant, and says who imitates whom."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import nn

from ..losses.channel_statistics import OWN
from ..losses.reduction import Batch
from ..staged import Run, StagedDetector, Taps
from ..teacher import Teacher

# An adapted tensor and what it imitates, of one shape, (R, D) or (N, D, H, W); the latter has no gradient.
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Assistance:
    """What a setting makes of a batch.

    Attributes:
        losses: the assistant's own losses on ground truth.
        akd: the assistant's adapted features and the teacher's, layer by layer.
        ckd: the student's adapted features and the teacher's.
    """

    losses: dict[str, torch.Tensor]
    akd: list[Pair] = field(default_factory=list)
    ckd: list[Pair] = field(default_factory=list)


class AssistSetting(nn.Module):
    """How HEAD serves one kind of pair; owns the assistant and the adapters."""

    @classmethod
    def build(cls, cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> "AssistSetting":
        """From ``MODEL.DISTILL.HEAD``; parts whose weight is 0 get no adapters.

        Raises:
            UserError: the setting cannot serve this pair of detectors.
        """
        raise NotImplementedError

    def taps(self) -> Taps:
        """Places in the towers that it reads from the ``taps`` of both runs, by branch."""
        return {}

    def forward(self, student: Run, teacher: Run | None) -> Assistance:
        raise NotImplementedError


def mimicry_loss(pairs: list[Pair], batch: Batch = OWN) -> torch.Tensor:
    """Return the sum over the pairs of the mean squared error; 0, with its graph, of a pair without elements.

    Args:
        batch: whose elements a mean is taken over.
    """
    sizes = batch.sizes([theirs.numel() for _, theirs in pairs], like=pairs[0][1])
    return sum(
        F.mse_loss(ours.float(), theirs.float(), reduction="sum") / size for (ours, theirs), size in zip(pairs, sizes)
    )


def recorded_sum(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of an assistant's losses, each of which is recorded."""
    get_event_storage().put_scalars(**{name: loss.item() for name, loss in losses.items()})
    return sum(losses.values())

"""Feature imitation: student maps that a 1x1 convolution turns into the teacher's."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
import torch.nn.functional as F
from torch import nn

from ..schedules import build_schedule
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import FeaturePair, pair_features, require_teacher


@DISTILL_METHOD_REGISTRY.register()
class FeatureImitation(DistillMethod):
    """Mean squared error between adapted student FPN maps and the teacher's (FitNet, arXiv 1412.6550).

    ``loss_imitation`` is the sum over levels of the mean over all elements. Each level has its own adapter, a
    1x1 convolution with bias from the student's channels to the teacher's. Where sizes differ the student's
    map is resized.
    """

    def __init__(self, *, pairs: List[FeaturePair], **kwargs) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs
        self.adapters = nn.ModuleDict(
            {pair.student: nn.Conv2d(pair.student_channels, pair.teacher_channels, 1) for pair in pairs}
        )

    @classmethod
    def from_config(cls, cfg, student, teacher) -> Dict[str, Any]:
        node = cfg.MODEL.DISTILL.IMITATION
        teacher = require_teacher(teacher, "FeatureImitation")
        key = "MODEL.DISTILL.IMITATION.IN_FEATURES"
        return {
            "pairs": pair_features(student, teacher.staged, node.IN_FEATURES, key),
            "weights": {"loss_imitation": node.WEIGHT},
            "schedule": build_schedule(node.SCHEDULE, "MODEL.DISTILL.IMITATION.SCHEDULE"),
        }

    def forward(self, student, teacher) -> Dict[str, torch.Tensor]:
        losses = []
        for pair in self.pairs:
            adapted = self.adapters[pair.student](student.features[pair.student])
            target = teacher.features[pair.teacher]
            if adapted.shape[-2:] != target.shape[-2:]:
                adapted = F.interpolate(adapted, size=target.shape[-2:], mode="bilinear", align_corners=False)
            losses.append(F.mse_loss(adapted, target))
        return {"loss_imitation": torch.stack(losses).sum()}

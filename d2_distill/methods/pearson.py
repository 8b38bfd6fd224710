"""PKD: feature maps that correlate with the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config.keys import extend_config
from ..losses import pearson_loss
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import FeaturePair, describe_pairs, pair_features


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.PKD = CfgNode()
    # Weight of the term loss_pkd.
    node.WEIGHT = 2.0
    # The student's features that imitate the teacher's; () for all whose stride the teacher has too.
    node.IN_FEATURES = ()
    # Factors on the weight by iteration; see schedules.py.
    node.SCHEDULE = []


@DISTILL_METHOD_REGISTRY.register()
class PKD(DistillMethod):
    """Pearson correlation between FPN maps, level by level (PKD, Cao et al., arXiv 2207.02039).

    ``loss_pkd`` is the sum over levels of :func:`~d2_distill.losses.pearson_loss`. It ignores each channel's
    scale and shift, so heterogeneous detectors can be paired. Where sizes differ, the student's map is
    resized. Where channels differ, which the publication leaves out, a trained 1x1 convolution adapts the student's.
    """

    KEY = "MODEL.DISTILL.PKD"
    WEIGHT_KEYS = {"loss_pkd": "WEIGHT"}
    RATIOS = {"loss_pkd": 3.0}  # on scenes and blood cells ahead of 1

    def __init__(self, *, pairs: list[FeaturePair], **kwargs) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs
        # Without bias, which the correlation would remove.
        self.adapters = nn.ModuleDict({
            pair.student: nn.Conv2d(pair.student_channels, pair.teacher_channels, 1, bias=False)
            for pair in pairs
            if pair.student_channels != pair.teacher_channels
        })

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        in_features = cfg.MODEL.DISTILL.PKD.IN_FEATURES
        pairs = pair_features(student, teacher.staged, in_features, f"{cls.KEY}.IN_FEATURES")
        return {**arguments, "pairs": pairs}

    def describe(self) -> str:
        return describe_pairs(self.pairs)

    def forward(self, student, teacher) -> dict[str, torch.Tensor]:
        losses = []
        for pair in self.pairs:
            ours = student.features[pair.student]
            if pair.student in self.adapters:
                ours = self.adapters[pair.student](ours)
            losses.append(pearson_loss(ours, teacher.features[pair.teacher], resize="student", batch=self.batch))
        return {"loss_pkd": torch.stack(losses).sum()}

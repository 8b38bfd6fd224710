"""MSAD: the pyramid of a low-resolution student becomes the one that its teacher fused of two resolutions."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage

from ..config.keys import extend_config
from ..errors import UserError
from ..staged import Run
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import FeaturePair, pair_features, require_same_channels


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.MSAD = CfgNode()
    # Weight of the term loss_msad; published as KD_ALPHA 0.2 times KD_TEMPERATURE 3.
    node.WEIGHT = 0.6
    # The student's features that imitate the teacher's; () for all whose stride the teacher has too.
    node.IN_FEATURES = ()
    # Factors on the weight by iteration; see schedules.py.
    node.SCHEDULE = [["Warmup", 0.005]]


@DISTILL_METHOD_REGISTRY.register()
class MSAD(DistillMethod):
    """Multi-scale aligned distillation (Qi et al., CVPR 2021, arXiv 2109.06875).

    ``loss_msad`` is the sum over levels of the mean absolute difference between the student's map and the
    teacher's of the same stride, which for a :class:`~d2_distill.detectors.MultiScaleDetector` is the fused
    one. The published temperature is but a factor on it and is in the weight. The scalar ``msad/raw`` is the
    term before weight and schedule.

    Any pair with maps of equal strides and channels can be taught so.

    Args:
        pairs: maps that are compared.
    """

    KEY = "MODEL.DISTILL.MSAD"
    WEIGHT_KEYS = {"loss_msad": "WEIGHT"}

    def __init__(self, *, pairs: list[FeaturePair], **kwargs) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        in_features = cfg.MODEL.DISTILL.MSAD.IN_FEATURES
        pairs = pair_features(student, teacher.staged, in_features, f"{cls.KEY}.IN_FEATURES")
        require_same_channels(pairs, "MSAD")
        return {**arguments, "pairs": pairs}

    def forward(self, student: Run, teacher: Run) -> dict[str, torch.Tensor]:
        losses = []
        for pair in self.pairs:
            ours, theirs = student.features[pair.student], teacher.features[pair.teacher]
            if ours.shape != theirs.shape:
                sizes = [tuple(x.shape[-2:]) for x in (ours, theirs)]
                raise UserError(
                    f"MSAD compares cell by cell, but the student's {pair.student} is of size {sizes[0]} and "
                    f"the teacher's {pair.teacher} of {sizes[1]}, as they pad the images differently; give both "
                    "heads the same IN_FEATURES and both the same FACTOR (MODEL.LOW_RESOLUTION, MODEL.MSAD)."
                )
            losses.append((ours.float() - theirs.float()).abs().mean())
        loss = torch.stack(losses).sum()
        get_event_storage().put_scalar("msad/raw", loss.detach())
        return {"loss_msad": loss}

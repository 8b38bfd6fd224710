"""Feature imitation: the student's feature maps become the teacher's, whole or where it matters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError
from ..staged import Run, StagedDetector
from ..teacher import Teacher
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .imitation_regions import REGIONS, ImitationRegion, finegrained, general_instances, inside_gt
from .pairing import (
    FeaturePair,
    pair_features,
    require_same_channels,
    require_same_classes,
    require_same_outputs,
)

KEY = "MODEL.DISTILL.IMITATION"
WHOLE = "whole"


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.IMITATION = CfgNode()
    # Weight of the term loss_imitation.
    node.WEIGHT = 1.0
    # The student's features that imitate the teacher's; () for all whose stride the teacher has too.
    node.IN_FEATURES = ()
    # Cells that are imitated: "whole" (FitNets), "inside_gt", "decouple" (DeFeat: inside_gt, and the rest with its own
    # weight), "finegrained", "gibox" (general instances) or "main" (positives); see regions/.
    node.REGION = "whole"
    # "decouple": factor on the cells outside the boxes.
    node.BACKGROUND_WEIGHT = 2.0
    # "gibox": True for 10 instances per level of each image, False for 10 of the whole batch (the published code).
    node.GI_PER_IMAGE = True
    # Whether each level has a learned 1x1 convolution from the student's channels to the teacher's.
    node.ADAPTER = True
    # Factors on the weight by iteration; see schedules.py.
    node.SCHEDULE = []


@DISTILL_METHOD_REGISTRY.register()
class FeatureImitation(DistillMethod):
    """Mean squared error between the student's FPN maps, adapted or not, and the teacher's.

    ``loss_imitation`` is the sum over levels of the mean over the channels and cells of a region, of all
    images of the batch together. ``MODEL.DISTILL.IMITATION.REGION`` is one of

    - "whole": all cells (FitNet, arXiv 1412.6550). Where sizes differ the student's map is resized.
    - "inside_gt": cells whose centre is strictly inside a ground-truth box.
    - "decouple": "inside_gt", plus a weighted mean over all other cells (DeFeat, arXiv 2103.14475).
    - "finegrained": cells with an anchor near an object (arXiv 1906.03609).
    - "gibox": on each level the cells of up to 10 general instances (arXiv 2103.02340), of each image or of
      the batch. The instances are anchors: several may share a cell, which counts once.
    - "main": cells with a positive anchor.

    All but "whole" are 0 on levels without any cell in the region and, as in LD's published code
    (arXiv 2102.12252), on those without any positive anchor of the student's assigner, of which a two-stage
    student has none. Cells that the student's assigner leaves out as padding of the batch are in no region,
    nor in the background of "decouple".

    Args:
        pairs: maps that are compared.
        adapt: whether each level has an adapter, a 1x1 convolution with bias from the student's channels to
            the teacher's; both have the same channels if not.
        region: None for whole maps.
    """

    KEY = KEY
    WEIGHT_KEYS = {"loss_imitation": "WEIGHT"}

    def __init__(
        self,
        *,
        pairs: list[FeaturePair],
        adapt: bool = True,
        region: ImitationRegion | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs
        self.region = region
        self.adapters = nn.ModuleDict()
        if adapt:
            for pair in pairs:
                self.adapters[pair.student] = nn.Conv2d(pair.student_channels, pair.teacher_channels, 1)

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        node = cfg.MODEL.DISTILL.IMITATION
        pairs = pair_features(student, teacher.staged, node.IN_FEATURES, f"{KEY}.IN_FEATURES")
        if not node.ADAPTER:
            require_same_channels(pairs, "FeatureImitation", adapter=f"{KEY}.ADAPTER")
        return {
            **arguments,
            "pairs": pairs,
            "adapt": node.ADAPTER,
            "region": build_region(cfg, node.REGION, student, teacher),
        }

    def forward(self, student: Run, teacher: Run) -> dict[str, torch.Tensor]:
        weights = {}
        if self.region is not None:
            self._require_same_sizes(student, teacher)
            weights = self.region.weights(student, teacher, self.batch)
        losses = []
        for pair in self.pairs:
            ours, theirs = student.features[pair.student], teacher.features[pair.teacher]
            if self.adapters:
                ours = self.adapters[pair.student](ours)
            if self.region is None:
                losses.append(F.mse_loss(_resize(ours, theirs), theirs))
            else:
                # All cells times weights that are mostly 0: to select them, the host would have to wait.
                errors = F.mse_loss(ours, theirs, reduction="none").mean(dim=1).flatten(start_dim=1)
                losses.append((errors * weights[pair.student]).sum())
        return {"loss_imitation": torch.stack(losses).sum()}

    def _require_same_sizes(self, student: Run, teacher: Run) -> None:
        for pair in self.pairs:
            ours = tuple(student.features[pair.student].shape[-2:])
            theirs = tuple(teacher.features[pair.teacher].shape[-2:])
            if ours != theirs:
                raise UserError(
                    f"{KEY}.REGION is a part of the maps, but the student's {pair.student} is of size {ours} "
                    f"and the teacher's {pair.teacher} of {theirs}, as their backbones pad the images "
                    "differently; only 'whole' resizes."
                )


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def build_region(
    cfg, name: str, student: StagedDetector, teacher: Teacher
) -> ImitationRegion | None:
    """A region by its name in ``MODEL.DISTILL.IMITATION.REGION``; None for "whole".

    Raises:
        UserError: there is no such region, or this pair does not have it.
    """
    node = cfg.MODEL.DISTILL.IMITATION
    if name == WHOLE:
        return None
    if name not in REGIONS:
        raise UserError(f"{KEY}.REGION is {name!r}; choose from {', '.join((WHOLE, *REGIONS))}.")
    anchors = REGIONS[name]
    if anchors is not inside_gt:
        _require_dense(name, student, teacher.staged)
    if anchors is finegrained and student.assigns_points:
        raise UserError(
            f"{KEY}.REGION 'finegrained' are anchors that overlap objects, but the student {student.kind} "
            f"(teacher {teacher.staged.kind}) assigns points; choose 'inside_gt' or 'main'."
        )
    if anchors is general_instances:
        method = f"FeatureImitation of REGION {name!r}"
        require_same_outputs(student, teacher.staged, method)
        require_same_classes(student, teacher, method)
        anchors = partial(general_instances, per_image=node.GI_PER_IMAGE)
    return ImitationRegion(anchors, node.BACKGROUND_WEIGHT if name == "decouple" else 0.0)


def _require_dense(region: str, student: StagedDetector, teacher: StagedDetector) -> None:
    sides = {"student": student, "teacher": teacher} if region == "gibox" else {"student": student}
    for side, detector in sides.items():
        if detector.family != "dense":
            raise UserError(
                f"{KEY}.REGION {region!r} needs a one-stage {' and '.join(sides)}, but the {side} is "
                f"{detector.kind} (student {student.kind}, teacher {teacher.kind}); 'whole', 'inside_gt' and "
                "'decouple' work for any pair."
            )

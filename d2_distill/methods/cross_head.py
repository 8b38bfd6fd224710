"""CrossKD: the student's tower features end in the teacher's head, to give what the teacher itself gives."""

from __future__ import annotations

from typing import Any, Dict, List

import torch

from ..data.classes import dataset_classes
from ..errors import UserError
from ..losses import align_statistics, giou_loss, kd_quality_focal_loss, log_iou_loss, weighted_mean
from ..schedules import build_schedule
from ..staged import DenseRun, StagedDense
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import require_same_classes, require_same_outputs, require_teacher

BOX_LOSSES = {"giou": giou_loss, "iou": log_iou_loss}


@DISTILL_METHOD_REGISTRY.register()
class CrossKD(DistillMethod):
    """Cross-head knowledge distillation (Wang et al., CVPR 2024, arXiv 2306.11369) for RetinaNet.

    The student's tap of each branch and level is re-standardised to the statistics of the teacher's tap, and
    run through the teacher's remaining blocks and prediction layer. Two terms compare the crossed predictions
    with the teacher's own, on all anchors that the student's assigner does not ignore:

    - ``loss_crosskd_cls``: quality focal mimicking of the logits;
    - ``loss_crosskd_box``: an IoU loss between decoded boxes, weighted by the teacher's best class scores.

    Both are divided by the positives of the batch, where an image without any counts as one.

    Args:
        tap: number of tower blocks in front of the tap; 0 is the FPN map.
        cls_beta: exponent of the quality focal modulation.
        box_loss: "giou" or "iou".
    """

    def __init__(self, *, tap: int, cls_beta: float, box_loss: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.tap = tap
        self.cls_beta = cls_beta
        self.box_loss = BOX_LOSSES[box_loss]

    @classmethod
    def from_config(cls, cfg, student, teacher) -> Dict[str, Any]:
        node = cfg.MODEL.DISTILL.CROSSKD
        teacher = require_teacher(teacher, "CrossKD")
        _check_pair(student, teacher.staged, node.TAP)
        require_same_classes(student, teacher, dataset_classes(cfg), "CrossKD")
        if node.BOX_LOSS not in BOX_LOSSES:
            raise UserError(
                f"MODEL.DISTILL.CROSSKD.BOX_LOSS is {node.BOX_LOSS!r}; choose from {', '.join(BOX_LOSSES)}."
            )
        if node.CLS_BETA < 1:
            raise UserError(f"MODEL.DISTILL.CROSSKD.CLS_BETA is {node.CLS_BETA}; it must be at least 1.")
        return {
            "tap": node.TAP,
            "cls_beta": node.CLS_BETA,
            "box_loss": node.BOX_LOSS,
            "weights": {"loss_crosskd_cls": node.CLS_WEIGHT, "loss_crosskd_box": node.BOX_WEIGHT},
            "schedule": build_schedule(node.SCHEDULE, "MODEL.DISTILL.CROSSKD.SCHEDULE"),
        }

    def taps(self):
        return {"cls": frozenset({self.tap}), "box": frozenset({self.tap})}

    def forward(self, student: DenseRun, teacher: DenseRun) -> Dict[str, torch.Tensor]:
        assignment = student.assignment
        valid = assignment.valid.to(torch.float32)
        normalizer = assignment.normalizer
        logits = torch.cat(teacher.outputs["logits"], dim=1)
        terms = {}
        if "loss_crosskd_cls" in self.weights:
            crossed = self._crossed(student, teacher, "logits")
            loss = kd_quality_focal_loss(crossed, logits, self.cls_beta)
            terms["loss_crosskd_cls"] = weighted_mean(loss, valid[..., None], normalizer)
        if "loss_crosskd_box" in self.weights:
            crossed = self._crossed(student, teacher, "deltas")
            boxes = teacher.staged.decode(teacher.anchors, crossed)
            with torch.no_grad():
                targets = teacher.staged.decode(teacher.anchors, torch.cat(teacher.outputs["deltas"], dim=1))
                confidence = logits.amax(dim=-1).sigmoid() * valid
            terms["loss_crosskd_box"] = weighted_mean(self.box_loss(boxes, targets), confidence, normalizer)
        return terms

    def _crossed(self, student: DenseRun, teacher: DenseRun, output: str) -> torch.Tensor:
        """(N, R, K): the teacher's predictions from the student's taps."""
        branch, _ = teacher.staged.predictors[output]
        tower = teacher.staged.towers[branch]
        maps: List[torch.Tensor] = []
        for ours, theirs in zip(student.taps[branch][self.tap], teacher.taps[branch][self.tap]):
            feature = align_statistics(ours, theirs)
            if self.tap:
                # The taps lie behind an activation; the alignment may have made them negative.
                feature = feature.relu()
            maps.append(teacher.staged.predict(output, tower.run(feature, self.tap)))
        return torch.cat(teacher.flatten(output, maps), dim=1)


def _check_pair(student, teacher, tap: int) -> None:
    for side, detector in (("student", student), ("teacher", teacher)):
        if not isinstance(detector, StagedDense) or set(detector.predictors) != {"logits", "deltas"}:
            raise UserError(
                f"CrossKD cannot use the {side} {detector.kind} (student {student.kind}, teacher "
                f"{teacher.kind}); both must be RetinaNet or OpenMMLabRetinaNet. PKD and FeatureImitation "
                "work for any pair."
            )
    require_same_outputs(student, teacher, "CrossKD")
    for branch in ("cls", "box"):
        blocks = {side: len(d.towers[branch]) for side, d in (("student", student), ("teacher", teacher))}
        if not 0 <= tap <= min(blocks.values()):
            raise UserError(
                f"MODEL.DISTILL.CROSSKD.TAP is {tap}; the student's towers have {blocks['student']} blocks "
                f"and the teacher's {blocks['teacher']} (MODEL.RETINANET.NUM_CONVS), so it must lie between "
                f"0 and {min(blocks.values())}."
            )
        ours, theirs = student.tap_channels(branch, tap), teacher.tap_channels(branch, tap)
        if ours != theirs:
            raise UserError(
                "CrossKD feeds the student's tower into the teacher's, but at MODEL.DISTILL.CROSSKD.TAP "
                f"{tap} the student has {ours} channels and the teacher {theirs}; give both the same "
                "MODEL.FPN.OUT_CHANNELS."
            )

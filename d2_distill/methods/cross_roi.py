"""CrossKD for two-stage detectors: the student's features end in the teacher's RoI head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from ..config.keys import extend_config
from ..detectors.stock import RCNNRun
from ..errors import PairError, UserError
from ..losses import kd_kl_div_loss, weighted_mean
from ..staged import StagedDetector
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import require_same_classes


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.CROSSKD_ROI = CfgNode()
    # Weight of the divergence between class distributions, loss_crosskd_roi_cls.
    node.CLS_WEIGHT = 0.5
    # Softens both class distributions.
    node.TEMPERATURE = 3.0
    # Weight of the L1 distance between box deltas, loss_crosskd_roi_box.
    node.BOX_WEIGHT = 1.0
    # The box term is a mean over the classes; its weight belongs to the 80 of COCO. Divide by this many classes, however
    # many there are; 0 is the mean.
    node.REFERENCE_CLASSES = 80
    # Factors on both weights by iteration; see schedules.py.
    node.SCHEDULE = []


@DISTILL_METHOD_REGISTRY.register()
class CrossKDRoI(DistillMethod):
    """Cross-head distillation (CrossKD, arXiv 2306.11369) of Faster R-CNN.

    The teacher's RoI head reads the student's features, and for comparison the teacher's own, both at the proposals
    that the student's losses are on. Each term is a mean over these proposals:

    - ``loss_crosskd_roi_cls``: divergence between the softened distributions over classes and background;
    - ``loss_crosskd_roi_box``: L1 distance between box deltas, summed over the four of a class and averaged over
      the classes.

    The paper has one-stage detectors only; losses and weights are those that its authors tried, untuned, on Faster
    R-CNN.

    Args:
        levels: feature that the teacher's RoI head reads -> the student's of the same stride.
        temperature: of both class distributions.
        reference_classes: classes that the mean over the classes is scaled to; 0 leaves it as it is.
    """

    KEY = "MODEL.DISTILL.CROSSKD_ROI"
    WEIGHT_KEYS = {"loss_crosskd_roi_cls": "CLS_WEIGHT", "loss_crosskd_roi_box": "BOX_WEIGHT"}

    def __init__(
        self, *, levels: dict[str, str], temperature: float, reference_classes: int = 0, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.levels = levels
        self.reference_classes = reference_classes
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        temperature = cfg.MODEL.DISTILL.CROSSKD_ROI.TEMPERATURE
        _require_standard_heads(student, teacher.staged)
        require_same_classes(student, teacher, "CrossKDRoI")
        if temperature <= 0:
            raise UserError(f"{cls.KEY}.TEMPERATURE is {temperature}; it must be above 0.")
        return {
            **arguments,
            "levels": _match_levels(student, teacher.staged),
            "temperature": temperature,
            "reference_classes": cfg.MODEL.DISTILL.CROSSKD_ROI.REFERENCE_CLASSES,
        }

    def forward(self, student: RCNNRun, teacher: RCNNRun) -> dict[str, torch.Tensor]:
        boxes = [proposals.proposal_boxes for proposals in student.sampled_proposals]
        features = {theirs: student.features[ours] for theirs, ours in self.levels.items()}
        roi_heads = teacher.staged.roi_heads
        outputs = roi_heads.stage(0, features, boxes)
        with torch.no_grad():
            targets = roi_heads.stage(0, teacher.features, boxes)
        losses = {}
        if "loss_crosskd_roi_cls" in self.weights:
            losses["loss_crosskd_roi_cls"] = kd_kl_div_loss(outputs.logits, targets.logits, self.temperature)
        if "loss_crosskd_roi_box" in self.weights:
            distances = F.l1_loss(outputs.deltas, targets.deltas, reduction="none").unflatten(1, (-1, 4))
            distances = distances.sum(dim=2)
            losses["loss_crosskd_roi_box"] = distances.sum(dim=1) / (self.reference_classes or distances.shape[1])
        # An empty sum is 0; its mean would not be a number.
        (rows,) = self.batch.sizes([len(outputs.logits)], like=outputs.logits)
        return {term: weighted_mean(loss, None, rows) for term, loss in losses.items()}


def _require_standard_heads(student: StagedDetector, teacher: StagedDetector) -> None:
    for side, detector in (("student", student), ("teacher", teacher)):
        if detector.roi_heads is None:
            raise PairError(
                f"CrossKDRoI cannot use the {side} {detector.kind} (student {student.kind}, teacher {teacher.kind}); "
                "both must be GeneralizedRCNN with MODEL.ROI_HEADS.NAME 'StandardROIHeads'."
            )
    if teacher.roi_heads.num_stages > 1:
        raise PairError(
            "CrossKDRoI cannot use a teacher with a cascade of box heads; choose one whose MODEL.ROI_HEADS.NAME is "
            "'StandardROIHeads'."
        )


def _match_levels(student: StagedDetector, teacher: StagedDetector) -> dict[str, str]:
    """Name of the student's feature for each one that the teacher's RoI head reads."""
    ours, theirs = student.feature_shapes(), teacher.feature_shapes()
    by_stride = {shape.stride: name for name, shape in ours.items()}
    levels = {}
    for name in teacher.roi_heads.in_features:
        stride, channels = theirs[name].stride, theirs[name].channels
        if stride not in by_stride:
            raise PairError(
                f"CrossKDRoI: the teacher's RoI head reads {name!r} of stride {stride}, and the student has strides "
                f"{sorted(by_stride)} only; make MODEL.FPN.IN_FEATURES of both equal."
            )
        levels[name] = by_stride[stride]
        if ours[levels[name]].channels != channels:
            raise PairError(
                f"CrossKDRoI feeds the student's features to the teacher's RoI head, but the student's "
                f"{levels[name]} has {ours[levels[name]].channels} channels and the teacher's {name} has {channels}; "
                "give both the same MODEL.FPN.OUT_CHANNELS."
            )
    return levels

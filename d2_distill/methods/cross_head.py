"""CrossKD: the student's tower features end in the teacher's head, to give what the teacher itself gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import nn

from ..boxes.geometry import distances_to_sides
from ..config.keys import extend_config
from ..errors import PairError, UserError
from ..losses import (
    BOX_LOSSES,
    align_statistics,
    centerness_targets,
    kd_kl_div_loss,
    mean_over_processes,
    quality_focal_loss,
    weighted_mean,
)
from ..staged import DenseRun, StagedDense, StagedDetector, Tap
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import require_same_classes, require_same_strides, same_anchors

KEY = "MODEL.DISTILL.CROSSKD"
# Term -> the output of the teacher's head that it compares.
OUTPUTS = {
    "loss_crosskd_cls": "logits",
    "loss_crosskd_box": "deltas",
    "loss_crosskd_centerness": "centerness",
}
TAP_KEYS = {"cls": "CLS_TAP", "box": "BOX_TAP"}


@extend_config
def add_config(cfg: CfgNode) -> None:
    # docs/crosskd.md has the published weights for each detector.
    node = cfg.MODEL.DISTILL.CROSSKD = CfgNode()
    # Number of tower blocks before the tap of the class tower, from 0 (the FPN map) to the tower's length.
    node.CLS_TAP = 3
    # The same for the box tower.
    node.BOX_TAP = 3
    # Whether the tap is after the activation of the last of these blocks, "post" (as published), or before it, "pre".
    node.TAP_ACTIVATION = "post"
    # Weight of the class term, loss_crosskd_cls.
    node.CLS_WEIGHT = 1.0
    # Exponent of the class term's quality focal modulation.
    node.CLS_BETA = 1.0
    # Weight of the box term, loss_crosskd_box.
    node.BOX_WEIGHT = 1.0
    # "kl", the divergence of the distributions that the teacher predicts; a loss of decoded boxes, by the names of the
    # detectors' BOX_LOSS; or "auto", which is "kl" if the teacher predicts distributions, else "giou".
    node.BOX_LOSS = "auto"
    # "kl": softens both distributions.
    node.BOX_TEMPERATURE = 1.0
    # Weight of the centerness term, loss_crosskd_centerness. Above 0 only if student and teacher predict centerness on
    # the same anchors; published for ATSS: 1.
    node.CENTERNESS_WEIGHT = 0.0
    # Lower bound of the number that divides the terms. It matters for FCOS students, whose sum of centerness targets
    # may be 0. The published code has 1e-6.
    node.NORMALIZER_FLOOR = 1.0
    # Factors on all three weights by iteration; see schedules.py.
    node.SCHEDULE = []


@DISTILL_METHOD_REGISTRY.register()
class CrossKD(DistillMethod):
    """Cross-head knowledge distillation (Wang et al., CVPR 2024, arXiv 2306.11369) of one-stage detectors.

    The student's tap of each branch and level, adapted by a 1x1 convolution if its channels are not the
    teacher's, is re-standardised to the statistics of the teacher's tap and goes on through the teacher's
    activation, remaining blocks and prediction layers. The outcome is compared with the teacher's own
    outputs, at the teacher's anchors. With a normaliser N and an anchor's highest class score r of the
    teacher:

    - ``loss_crosskd_cls``: quality focal mimicking of the class logits, sum / N;
    - ``loss_crosskd_box``: the divergence of box distributions, averaged over the four sides,
      sum of r * divergence / sum of r; or a loss of decoded boxes, sum of r * loss / N;
    - ``loss_crosskd_centerness``: binary cross entropy with the teacher's centerness at the student's
      positives, sum / N.

    N is the student's number of positives, where an image without any counts as one, averaged over the
    processes unless the student is a RetinaNet; for FCOS it is the sum of the positives' centerness targets,
    averaged too. Anchors that the student's assigner ignores are left out.

    The publication has pairs of equal heads only. Chosen here: where the anchors differ, those are left out
    that see only padding by the teacher's rule (``StagedDense.valid_anchors``). GFLv2's class logits are
    compared without the output that is no class and without its quality, which follows from the box
    distributions; r contains the quality.

    Args:
        taps: branch -> where both towers are tapped, for each branch that a term needs.
        cls_beta: exponent of the quality focal modulation.
        box_loss: "kl" for the divergence of distributions, or a key of ``losses.BOX_LOSSES``.
        box_temperature: softens the distributions.
        normalizer_floor: lower bound of N.
        shares_anchors: whether student and teacher have the same anchors.
        adapters: branch -> channels of the student's and of the teacher's tap, where they differ.
    """

    KEY = KEY
    WEIGHT_KEYS = {
        "loss_crosskd_cls": "CLS_WEIGHT",
        "loss_crosskd_box": "BOX_WEIGHT",
        "loss_crosskd_centerness": "CENTERNESS_WEIGHT",
    }

    def __init__(
        self,
        *,
        taps: Mapping[str, Tap],
        cls_beta: float,
        box_loss: str,
        box_temperature: float,
        normalizer_floor: float,
        shares_anchors: bool = True,
        adapters: Mapping[str, tuple[int, int]] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.tap_of = taps
        self.cls_beta = cls_beta
        self.box_loss = box_loss
        self.box_temperature = box_temperature
        self.normalizer_floor = normalizer_floor
        self.shares_anchors = shares_anchors
        # Without bias, which the alignment would remove.
        self.adapters = nn.ModuleDict({
            branch: nn.Conv2d(*channels, 1, bias=False) for branch, channels in (adapters or {}).items()
        })

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        node = cfg.MODEL.DISTILL.CROSSKD
        _check_values(node)
        _check_pair(student, teacher.staged)
        require_same_classes(student, teacher, "CrossKD")
        if node.CENTERNESS_WEIGHT:
            _check_centerness(student, teacher.staged)
        terms = [term for term, weight in arguments["weights"].items() if weight]
        used = {teacher.staged.predictors[OUTPUTS[term]][0] for term in terms}
        taps = {branch: _tap(node, branch, student, teacher.staged) for branch in sorted(used)}
        channels = {
            branch: tuple(side.tap_channels(branch, tap.position) for side in (student, teacher.staged))
            for branch, tap in taps.items()
        }
        return {
            **arguments,
            "taps": taps,
            "cls_beta": node.CLS_BETA,
            "box_loss": _box_loss(node.BOX_LOSS, teacher.staged),
            "box_temperature": node.BOX_TEMPERATURE,
            "normalizer_floor": node.NORMALIZER_FLOOR,
            "shares_anchors": same_anchors(student, teacher.staged),
            "adapters": {branch: pair for branch, pair in channels.items() if pair[0] != pair[1]},
        }

    def taps(self):
        return {branch: frozenset({tap}) for branch, tap in self.tap_of.items()}

    def forward(self, student: DenseRun, teacher: DenseRun) -> dict[str, torch.Tensor]:
        crossed = self.crossed_outputs(student, teacher)
        with torch.no_grad():
            own = {output: torch.cat(levels, dim=1) for output, levels in teacher.outputs.items()}
            valid = student.assignment.valid if self.shares_anchors else teacher.valid_anchors
            normalizer = self._normalizer(student)

        terms = {}
        if "loss_crosskd_cls" in self.weights:
            ours, theirs = (_classes(teacher.staged, x["logits"]).float() for x in (crossed, own))
            loss = quality_focal_loss(ours, theirs.sigmoid(), self.cls_beta).sum(dim=-1)
            terms["loss_crosskd_cls"] = weighted_mean(loss, valid, normalizer)
        if "loss_crosskd_box" in self.weights:
            confidence = _confidence(teacher.staged, own)
            if valid is not None:
                confidence = confidence * valid
            ours, theirs = crossed["deltas"], own["deltas"]
            if self.box_loss == "kl":
                ours, theirs = (x.float().unflatten(-1, (4, -1)) for x in (ours, theirs))
                loss = kd_kl_div_loss(ours, theirs, self.box_temperature).mean(dim=-1)
                terms["loss_crosskd_box"] = weighted_mean(loss, confidence, confidence.sum())
            else:
                ours, theirs = (teacher.staged.decode(teacher.anchors, x) for x in (ours, theirs))
                loss = BOX_LOSSES[self.box_loss](ours, theirs)
                terms["loss_crosskd_box"] = weighted_mean(loss, confidence, normalizer)
        if "loss_crosskd_centerness" in self.weights:
            targets = own["centerness"].sigmoid()
            loss = F.binary_cross_entropy_with_logits(crossed["centerness"], targets, reduction="none")
            positive = student.assignment.foreground[..., None]
            terms["loss_crosskd_centerness"] = weighted_mean(loss, positive, normalizer)
        return terms

    def crossed_outputs(self, student: DenseRun, teacher: DenseRun) -> dict[str, torch.Tensor]:
        """What the teacher's head makes of the student's taps: output -> (N, R, K) at its R anchors."""
        head = teacher.staged
        maps: dict[str, list[torch.Tensor]] = {OUTPUTS[term]: [] for term in self.weights}
        for branch, tap in self.tap_of.items():
            # Taps behind an activation go through it again: the alignment may make features negative.
            start = Tap(tap.position, activated=tap.position == 0)
            pairs = zip(student.taps[branch][tap], teacher.taps[branch][tap])
            for level, (ours, theirs) in enumerate(pairs):
                _require_same_size(level, ours, theirs)
                if branch in self.adapters:
                    ours = self.adapters[branch](ours)
                end = head.towers[branch].run(align_statistics(ours, theirs), start)
                for output, levels in maps.items():
                    if head.predictors[output][0] == branch:
                        levels.append(head.predict(output, end, level))
        return {output: torch.cat(teacher.flatten(output, levels), dim=1) for output, levels in maps.items()}

    def _normalizer(self, student: DenseRun) -> torch.Tensor:
        """N, see the class."""
        staged, assignment = student.staged, student.assignment
        if staged.assigns_points:
            distances = distances_to_sides(Boxes.cat(student.anchors).get_centers(), assignment.boxes)
            normalizer = (centerness_targets(distances) * assignment.foreground).sum()
        else:
            normalizer = assignment.normalizer
        if staged.averages_normalizer:
            normalizer = mean_over_processes(normalizer)
        return normalizer.clamp(min=self.normalizer_floor)


def _classes(staged: StagedDense, logits: torch.Tensor) -> torch.Tensor:
    """Without the output of GFLv2 that is no class. A slice of all would cost a copy of the gradient."""
    return logits if logits.shape[-1] == staged.num_classes else logits[..., : staged.num_classes]


@torch.no_grad()
def _confidence(staged: StagedDense, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, R) highest class score. The highest logit has it, so that the others are not made into scores."""
    highest = _classes(staged, outputs["logits"]).amax(dim=-1, keepdim=True)
    return staged.class_scores({**outputs, "logits": highest}).squeeze(-1)


def _require_same_size(level: int, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.shape[-2:] != theirs.shape[-2:]:
        raise UserError(
            f"CrossKD compares location by location, but level {level} is of size {tuple(ours.shape[-2:])} "
            f"in the student and {tuple(theirs.shape[-2:])} in the teacher: their backbones pad the images "
            "differently; PKD and FeatureImitation resize."
        )


def _check_values(node) -> None:
    for name, value, choices in (
        ("TAP_ACTIVATION", node.TAP_ACTIVATION, ("post", "pre")),
        ("BOX_LOSS", node.BOX_LOSS, ("auto", "kl", *BOX_LOSSES)),
    ):
        if value not in choices:
            raise UserError(f"{KEY}.{name} is {value!r}; choose from {', '.join(choices)}.")
    if node.CLS_BETA < 1:
        raise UserError(f"{KEY}.CLS_BETA is {node.CLS_BETA}; it must be at least 1.")
    for name in ("BOX_TEMPERATURE", "NORMALIZER_FLOOR"):
        if node[name] <= 0:
            raise UserError(f"{KEY}.{name} is {node[name]}; it must be positive.")


def _check_pair(student: StagedDetector, teacher: StagedDetector) -> None:
    for side, detector in (("student", student), ("teacher", teacher)):
        if not isinstance(detector, StagedDense):
            raise PairError(
                f"CrossKD cannot use the {side} {detector.kind} (student {student.kind}, teacher "
                f"{teacher.kind}); both must be one-stage detectors."
            )
    require_same_strides(student, teacher, "CrossKD")


def _check_centerness(student: StagedDense, teacher: StagedDense) -> None:
    for side, detector in (("student", student), ("teacher", teacher)):
        if "centerness" not in detector.predictors:
            raise UserError(
                f"{KEY}.CENTERNESS_WEIGHT is not 0, but the {side} ({detector.kind}) predicts no centerness; "
                "set it to 0."
            )
    if not same_anchors(student, teacher):
        raise UserError(
            f"{KEY}.CENTERNESS_WEIGHT is not 0, but the anchors of the student ({student.kind}) and the "
            f"teacher ({teacher.kind}) differ, and centerness belongs to the student's positives; set it "
            "to 0."
        )


def _tap(node, branch: str, student: StagedDense, teacher: StagedDense) -> Tap:
    position = node[TAP_KEYS[branch]]
    blocks = [len(side.towers[branch]) for side in (student, teacher)]
    if not 0 <= position <= min(blocks):
        raise UserError(
            f"{KEY}.{TAP_KEYS[branch]} is {position}; the student's towers have {blocks[0]} blocks and the "
            f"teacher's {blocks[1]} (NUM_CONVS), so it must lie between 0 and {min(blocks)}."
        )
    return Tap(position, activated=node.TAP_ACTIVATION == "post" or position == 0)


def _box_loss(name: str, teacher: StagedDense) -> str:
    """The loss that ``MODEL.DISTILL.CROSSKD.BOX_LOSS`` means for this teacher."""
    if name == "auto":
        return "giou" if teacher.reg_max is None else "kl"
    if name == "kl" and teacher.reg_max is None:
        raise UserError(
            f"{KEY}.BOX_LOSS is 'kl', but the teacher ({teacher.kind}) predicts no distributions; choose "
            f"'auto' or a loss of decoded boxes: {', '.join(BOX_LOSSES)}."
        )
    return name

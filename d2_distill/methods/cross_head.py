"""CrossKD: the student's tower features end in the teacher's head, to give what the teacher itself gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from ..config.keys import extend_config
from ..errors import PairError, UserError
from ..layers.tower import Tap, Tower
from ..losses import (
    BOX_LOSSES,
    align_statistics,
    kd_kl_div_loss,
    quality_focal_loss,
    weighted_mean,
)
from ..staged import DenseRun, StagedDense, StagedDetector
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import TOWERS, require_same_classes, require_same_strides, same_anchors

KEY = "MODEL.DISTILL.CROSSKD"
# Term -> the output of the teacher's head that it compares.
OUTPUTS = {
    "loss_crosskd_cls": "logits",
    "loss_crosskd_box": "deltas",
    "loss_crosskd_centerness": "centerness",
}
TAP_KEYS = {"cls": "CLS_TAP", "box": "BOX_TAP"}


@dataclass(frozen=True)
class Crossing:
    """Where a tower of the student goes on in a tower of the teacher.

    Attributes:
        student, teacher: branches.
        tap: the place in both towers.
        outputs: what the teacher predicts from there.
    """

    student: str
    teacher: str
    tap: Tap
    outputs: tuple[str, ...]


@extend_config
def add_config(cfg: CfgNode) -> None:
    # docs/crosskd.md has the published weights for each detector.
    node = cfg.MODEL.DISTILL.CROSSKD = CfgNode()
    # Number of tower blocks before the tap of the class tower, from 0 (the FPN map) to the tower's length; -1 for all
    # but one of the shorter of both towers (as published: 3 of 4).
    node.CLS_TAP = -1
    # The same for the box tower.
    node.BOX_TAP = -1
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

    N is what the student divides its own class loss by (``StagedDense.normalizer``): its number of positives, where
    an image without any counts as one, averaged over the processes unless the student is a RetinaNet; for FCOS the sum
    of the positives' centerness targets, for TOOD that of its soft targets, averaged as well. Anchors that the student's
    assigner ignores are left out.

    The publication has pairs of equal heads only. Chosen here: where the anchors differ, those are left out
    that see only padding by the teacher's rule (``AnchorGrid.valid``). GFLv2's class logits are
    compared without the output that is no class and without its quality, which follows from the box
    distributions; r contains the quality. Where a predictor of the teacher reads its tower before the tap as well, it
    reads the teacher's own feature there.

    Args:
        crossings: name -> where the student's tower goes on in the teacher's, for each that a term needs.
        cls_beta: exponent of the quality focal modulation.
        box_loss: "kl" for the divergence of distributions, or a key of ``losses.BOX_LOSSES``.
        box_temperature: softens the distributions.
        normalizer_floor: lower bound of N.
        shares_anchors: whether student and teacher have the same anchors.
        adapters: name of a crossing -> channels of the student's and of the teacher's tap, where they differ.
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
        crossings: Mapping[str, Crossing],
        cls_beta: float,
        box_loss: str,
        box_temperature: float,
        normalizer_floor: float,
        shares_anchors: bool = True,
        adapters: Mapping[str, tuple[int, int]] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.crossings = crossings
        self.cls_beta = cls_beta
        self.box_loss = box_loss
        self.box_temperature = box_temperature
        self.normalizer_floor = normalizer_floor
        self.shares_anchors = shares_anchors
        # Without bias, which the alignment would remove.
        self.adapters = nn.ModuleDict({
            name: nn.Conv2d(*channels, 1, bias=False) for name, channels in (adapters or {}).items()
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
        outputs = [OUTPUTS[term] for term, weight in arguments["weights"].items() if weight]
        crossings = _crossings(node, outputs, student, teacher.staged)
        channels = {
            name: (
                student.tap_channels(crossing.student, crossing.tap.position),
                teacher.staged.tap_channels(crossing.teacher, crossing.tap.position),
            )
            for name, crossing in crossings.items()
        }
        return {
            **arguments,
            "crossings": crossings,
            "cls_beta": node.CLS_BETA,
            "box_loss": _box_loss(node.BOX_LOSS, teacher.staged),
            "box_temperature": node.BOX_TEMPERATURE,
            "normalizer_floor": node.NORMALIZER_FLOOR,
            "shares_anchors": same_anchors(student, teacher.staged),
            "adapters": {name: pair for name, pair in channels.items() if pair[0] != pair[1]},
        }

    def describe(self) -> str:
        places = [
            f"{name} tower after block {crossing.tap.position}"
            + (f", adapted to {self.adapters[name].out_channels} channels" if name in self.adapters else "")
            for name, crossing in self.crossings.items()
        ]
        return f"{'; '.join(places)}; boxes by {self.box_loss}"

    def taps(self):
        wanted: dict[str, frozenset[Tap]] = {}
        for crossing in self.crossings.values():
            for branch in (crossing.student, crossing.teacher):
                wanted[branch] = wanted.get(branch, frozenset()) | {crossing.tap}
        return wanted

    def forward(self, student: DenseRun, teacher: DenseRun) -> dict[str, torch.Tensor]:
        crossed, own = self.crossed_outputs(student, teacher), teacher.outputs
        with torch.no_grad():
            valid = student.assignment.valid if self.shares_anchors else teacher.grid.valid
            normalizer = student.staged.normalizer(student.grid, student.assignment)
            normalizer = normalizer.clamp(min=self.normalizer_floor)

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
                terms["loss_crosskd_box"] = weighted_mean(loss, confidence, self.batch.mean(confidence.sum()))
            else:
                ours, theirs = (teacher.staged.decode(teacher.grid, x) for x in (ours, theirs))
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
        wanted = [OUTPUTS[term] for term in self.weights]
        maps: dict[str, list[torch.Tensor]] = {}
        for name, crossing in self.crossings.items():
            outputs = {
                output: teacher.staged.predictors[output].reads for output in crossing.outputs if output in wanted
            }
            features = zip(student.taps[crossing.student][crossing.tap], teacher.taps[crossing.teacher][crossing.tap])
            for level, (ours, theirs) in enumerate(features):
                _require_same_size(level, ours, theirs)
                if name in self.adapters:
                    ours = self.adapters[name](ours)
                places = {place for reads in outputs.values() for place in reads}
                reached = _go_on(crossing, teacher.staged, align_statistics(ours, theirs, self.batch), places)
                for output, reads in outputs.items():
                    read = [reached[place] if place in reached else _feature(teacher, place, level) for place in reads]
                    maps.setdefault(output, []).append(teacher.staged.predict(output, read, level))
        return {output: teacher.grid.join(levels) for output, levels in maps.items()}

def _go_on(
    crossing: Crossing, teacher: StagedDense, x: torch.Tensor, places: Iterable[tuple[str, Tap]]
) -> dict[tuple[str, Tap], torch.Tensor]:
    """What the teacher's tower makes of a feature at the crossing, at those of the places that lie after it."""
    tower, branch, tap = teacher.towers[crossing.teacher], crossing.teacher, crossing.tap
    stops = [place for name, place in places if name == branch and place >= tap]
    return {(branch, stop): feature for stop, feature in tower.run_through(x, stops, tower.resumed(tap)).items()}


def _feature(run: DenseRun, place: tuple[str, Tap], level: int) -> torch.Tensor:
    branch, tap = place
    return run.taps[branch][tap][level]


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
        if detector.family != "dense":
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


def _crossings(
    node, outputs: Iterable[str], student: StagedDense, teacher: StagedDense
) -> dict[str, Crossing]:
    """Where the student's towers go on in the teacher's to give these outputs, "cls" or "box" -> crossing."""
    found: dict[str, Crossing] = {}
    for output in outputs:
        branch = teacher.branch_of(output)
        # A tower that all outputs share is crossed into from the student's tower of the output.
        name = branch if branch in TOWERS else "cls" if output == "logits" else "box"
        ours = student.branch_of(TOWERS[name])
        tap = _tap(node, name, student.towers[ours], teacher.towers[branch])
        # Outputs that go the same way go it together.
        name = next((n for n, c in found.items() if (c.student, c.teacher, c.tap) == (ours, branch, tap)), name)
        before = found[name].outputs if name in found else ()
        found[name] = Crossing(ours, branch, tap, (*before, output))
    return dict(sorted(found.items()))


def _tap(node, name: str, student: Tower, teacher: Tower) -> Tap:
    position, blocks = node[TAP_KEYS[name]], [len(student), len(teacher)]
    if position == -1:
        position = max(min(blocks) - 1, 0)
    if not 0 <= position <= min(blocks):
        raise UserError(
            f"{KEY}.{TAP_KEYS[name]} is {position}; the student's towers have {blocks[0]} blocks and the "
            f"teacher's {blocks[1]} (NUM_CONVS), so it must lie between 0 and {min(blocks)}, or be -1."
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

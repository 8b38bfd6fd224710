"""HEAD between one-stage detectors of different kinds: towers face towers, level by level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import nn

from ..assistants.dense import DenseAssistant, end_channels, tower_ends
from ..errors import PairError, UserError
from ..staged import DenseRun, StagedDense, Tap
from ..teacher import Teacher
from .assistance import Assistance, AssistSetting, Pair
from .pairing import TOWERS, require_same_strides

KEY = "MODEL.DISTILL.HEAD"
# "cls" or "box" -> channels of what is adapted, and of what it imitates.
Channels = Mapping[str, tuple[int, int]]


class SameLevels(AssistSetting):
    """One-stage student and teacher, their heads reading equal strides; the assistant is of the teacher's kind.

    On every level, and for the class and the box tower each, the end of the assistant's tower (AKD) and a
    place in the student's (CKD) imitate the end of the teacher's through a 1x1 convolution with bias, which
    all levels share. The pattern is the publication's with RepPoints as teacher, whose further layers (the
    predicted points) other detectors do not have; RepPoints itself is left out. A tower that classes and boxes
    share is the class and the box tower; where both sides have one, it is imitated once.

    Args:
        assistant: of the teacher's kind.
        akd, ckd: "cls" or "box" -> channels of the adapters; empty without AKD or CKD.
        cross_tap: place in the student's towers, for CKD; None for their ends.
        cross_branches: the towers in which it is.
    """

    def __init__(
        self,
        *,
        assistant: DenseAssistant,
        akd: Channels,
        ckd: Channels,
        cross_tap: Tap | None = None,
        cross_branches: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.assistant = assistant
        self.akd, self.ckd = _adapters(akd), _adapters(ckd)
        self.cross_tap, self.cross_branches = cross_tap, tuple(cross_branches)

    @classmethod
    def build(cls, cfg: CfgNode, student: StagedDense, teacher: Teacher) -> "SameLevels":
        node = cfg.MODEL.DISTILL.HEAD
        if teacher.staged.is_wrapper:
            raise PairError(
                f"HEAD cannot use the teacher {teacher.staged.kind}, for which no head of its kind can be built on the "
                "student's features; choose another one-stage detector, or a two-stage one."
            )
        require_same_strides(student, teacher.staged, "HEAD")
        names = zip(teacher.staged.feature_shapes(), student.feature_shapes())
        assistant = DenseAssistant.build(
            teacher.cfg,
            teacher.staged.kind,
            student,
            names=dict(names),
            key="The teacher's MODEL.META_ARCHITECTURE",
        )
        if node.ASSISTANT_INIT == "teacher":
            assistant.load(teacher.model)
        cross_tap = _cross_tap(node.CKD_TAP, student, teacher.staged) if node.CKD_WEIGHT else None
        akd, ckd = {}, {}
        if node.AKD_WEIGHT:
            for name, (ours, theirs) in _facing(assistant.staged, teacher.staged).items():
                akd[name] = end_channels(assistant.staged, ours), end_channels(teacher.staged, theirs)
        if node.CKD_WEIGHT:
            for name, (ours, theirs) in _facing(student, teacher.staged).items():
                tap = cross_tap or student.towers[ours].end
                ckd[name] = student.tap_channels(ours, tap.position), end_channels(teacher.staged, theirs)
        branches = {student.branch_of(TOWERS[name]) for name in ckd}
        return cls(assistant=assistant, akd=akd, ckd=ckd, cross_tap=cross_tap, cross_branches=branches)

    def taps(self) -> dict[str, frozenset[Tap]]:
        return dict.fromkeys(self.cross_branches, frozenset({self.cross_tap})) if self.cross_tap else {}

    def forward(self, student: DenseRun, teacher: DenseRun | None) -> Assistance:
        run = self.assistant(student)
        akd: list[Pair] = []
        ckd: list[Pair] = []
        for name, adapter in self.akd.items():
            ours, theirs = (side.staged.branch_of(TOWERS[name]) for side in (run, teacher))
            akd += _pairs(adapter, tower_ends(run, ours), tower_ends(teacher, theirs))
        for name, adapter in self.ckd.items():
            ours, theirs = (side.staged.branch_of(TOWERS[name]) for side in (student, teacher))
            features = student.taps[ours][self.cross_tap] if self.cross_tap else tower_ends(student, ours)
            ckd += _pairs(adapter, features, tower_ends(teacher, theirs))
        return Assistance(run.losses, akd, ckd)


def _facing(ours: StagedDense, theirs: StagedDense) -> dict[str, tuple[str, str]]:
    """"cls" and "box" -> branches of ours and of theirs; two that are shared on both sides once."""
    found: dict[str, tuple[str, str]] = {}
    for name, output in TOWERS.items():
        branches = ours.branch_of(output), theirs.branch_of(output)
        if branches not in found.values():
            found[name] = branches
    return found


def _adapters(channels: Channels) -> nn.ModuleDict:
    return nn.ModuleDict({branch: nn.Conv2d(*pair, 1) for branch, pair in channels.items()})


def _cross_tap(position: int, student: StagedDense, teacher: StagedDense) -> Tap | None:
    """The place that ``CKD_TAP`` means in the student's towers; None for their ends."""
    if position == -1:
        return None
    # The places are kept in the teacher's towers too.
    blocks = [len(side.towers[side.branch_of(output)]) for side in (student, teacher) for output in TOWERS.values()]
    if not 0 <= position <= min(blocks):
        raise UserError(
            f"{KEY}.CKD_TAP is {position}; the towers of student and teacher have {blocks[0]} and "
            f"{blocks[-1]} blocks (NUM_CONVS), so it must lie between 0 and {min(blocks)}, or be -1 for the "
            "student's end."
        )
    return Tap(position)


def _pairs(adapter: nn.Module, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> list[Pair]:
    for level, (x, y) in enumerate(zip(ours, theirs)):
        if x.shape[-2:] != y.shape[-2:]:
            raise UserError(
                f"HEAD compares towers location by location, but level {level} is of size "
                f"{tuple(x.shape[-2:])} in the student and {tuple(y.shape[-2:])} in the teacher: their "
                "backbones pad the images differently; PKD and FeatureImitation resize."
            )
    return [(adapter(x), y) for x, y in zip(ours, theirs)]

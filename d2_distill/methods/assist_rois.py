"""HEAD with an assistant on RoIs: an R-CNN or Cascade R-CNN head on the features of a student of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import nn

from ..assistants.proposals import DenseProposer
from ..assistants.roi import RoIAssistant, roi_features
from ..assistants.tracing import TracedAdapter
from ..detectors.roi_heads import RoIStage
from ..detectors.stock import RCNNRun
from ..errors import PairError, UserError
from ..staged import DenseRun, Run, StagedDense, StagedDetector, Tap
from ..teacher import Teacher
from .assistance import Assistance, AssistSetting, Pair

KEY = "MODEL.DISTILL.HEAD"


class RoISetting(AssistSetting):
    """What both settings below share: AKD.

    Each fully connected layer of the assistant imitates, through a linear layer, the teacher's on the same RoIs,
    which both pool from their own features. A cascade's stages are compared one by one, each on the assistant's
    RoIs of that stage.

    Args:
        assistant: of the teacher's architecture.
        teacher_dims: width of each fully connected layer of the teacher; empty without AKD.
        cross: adapter of CKD; None without.
    """

    def __init__(
        self, *, assistant: RoIAssistant, teacher_dims: Sequence[int], cross: nn.Module | None
    ) -> None:
        super().__init__()
        self.assistant = assistant
        dims = list(zip(assistant.staged.fc_dims, teacher_dims))
        stages = range(assistant.staged.num_stages if dims else 0)
        self.akd = nn.ModuleList(nn.ModuleList(nn.Linear(*pair) for pair in dims) for _ in stages)
        self.cross = cross

    def sample(self, student: Run) -> list[Instances]:
        """Labelled RoIs for the assistant's first stage."""
        raise NotImplementedError

    def cross_pair(self, student: Run, sampled: list[Instances], target: torch.Tensor) -> Pair:
        """CKD's pair; ``target`` (R, D) is the teacher's last layer on the R sampled RoIs."""
        raise NotImplementedError

    def forward(self, student: Run, teacher: Run | None) -> Assistance:
        sampled = self.sample(student)
        assistance = self.assistant(student.features, sampled, student.gt_instances)
        # AKD needs the teacher's vectors of every stage, CKD those of the first.
        stages = assistance.stages[: len(self.akd) or int(self.cross is not None)]
        theirs = _teacher_vectors(teacher, stages) if stages else []
        akd = [
            (adapter(x), y)
            for adapters, stage, vectors in zip(self.akd, stages, theirs)
            for adapter, x, y in zip(adapters, stage.outputs.vectors, vectors)
        ]
        ckd = [self.cross_pair(student, sampled, theirs[0][-1])] if self.cross is not None else []
        return Assistance(assistance.losses, akd, ckd)


class TracedRoIs(RoISetting):
    """A one-stage student proposes RoIs to the assistant.

    CKD: the student's classification tower where it proposed a RoI imitates the teacher's last fully connected
    layer, of the first stage, on that RoI; RoIs that are ground-truth boxes are left out.

    Args:
        proposer: the student as region proposal network.
        kwargs: of :class:`RoISetting`.
    """

    cross: TracedAdapter | None

    def __init__(self, *, proposer: DenseProposer, **kwargs) -> None:
        super().__init__(**kwargs)
        self.proposer = proposer

    @classmethod
    def build(cls, cfg: CfgNode, student: StagedDense, teacher: Teacher | None) -> "TracedRoIs":
        node, cross = cfg.MODEL.DISTILL.HEAD, None
        options = {} if teacher is None else {"count": len(teacher.staged.roi_heads.in_features)}
        shapes = roi_features(student, node.IN_FEATURES, f"{KEY}.IN_FEATURES", **options)
        assistant = _build_assistant(cfg, shapes, student, teacher)
        if node.CKD_WEIGHT:
            tap = _tap(node.CKD_TAP, student)
            cross = TracedAdapter(student, tap, _teacher_dims(teacher)[-1], per_anchor=node.PER_ANCHOR)
        return cls(
            proposer=DenseProposer.from_cfg(cfg),
            assistant=assistant,
            teacher_dims=_teacher_dims(teacher) if node.AKD_WEIGHT else (),
            cross=cross,
        )

    def taps(self):
        return {} if self.cross is None else self.cross.taps()

    def sample(self, student: DenseRun) -> list[Instances]:
        return self.assistant.sample(self.proposer.propose(student), student.gt_instances)

    def cross_pair(self, student: DenseRun, sampled: list[Instances], target: torch.Tensor) -> Pair:
        return self.cross(student, sampled, target)


class SharedRoIs(RoISetting):
    """A two-stage student and the assistant share one sample of the student's proposals.

    CKD: the last fully connected layer of the student's own RoI head imitates, through a linear layer without bias,
    the teacher's of the first stage. (The published code samples twice, so that its rows are of different RoIs.)
    """

    @classmethod
    def build(cls, cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> "SharedRoIs":
        node, cross = cfg.MODEL.DISTILL.HEAD, None
        if not student.has_roi_stages:
            raise PairError(
                f"HEAD cannot use the RoI heads of the student {' '.join([student.kind, *student.traits()])}: they must be "
                "StandardROIHeads with boxes only; set MODEL.ROI_HEADS.NAME to 'StandardROIHeads', and MODEL.MASK_ON, "
                "MODEL.KEYPOINT_ON and MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES to False."
            )
        names = list(node.IN_FEATURES) or _same_strides(student, student if teacher is None else teacher.staged)
        shapes = roi_features(student, names, f"{KEY}.IN_FEATURES")
        assistant = _build_assistant(cfg, shapes, student, teacher)
        if node.CKD_WEIGHT:
            cross = nn.Linear(student.roi_heads.fc_dims[-1], _teacher_dims(teacher)[-1], bias=False)
        return cls(
            assistant=assistant, teacher_dims=_teacher_dims(teacher) if node.AKD_WEIGHT else (), cross=cross
        )

    def sample(self, student: RCNNRun) -> list[Instances]:
        return student.sampled_proposals

    def cross_pair(self, student: RCNNRun, sampled: list[Instances], target: torch.Tensor) -> Pair:
        return self.cross(student.rois[0].outputs.vectors[-1]), target


@torch.no_grad()
def _teacher_vectors(teacher: RCNNRun, stages: Sequence[RoIStage]) -> list[list[torch.Tensor]]:
    """For each stage, the vectors of the teacher's same stage on the RoIs of the assistant's."""
    return [
        teacher.staged.roi_heads.stage(index, teacher.features, [image.proposal_boxes for image in stage.proposals]).vectors
        for index, stage in enumerate(stages)
    ]


def _teacher_dims(teacher: Teacher) -> list[int]:
    return teacher.staged.roi_heads.fc_dims


def _build_assistant(
    cfg: CfgNode, shapes: dict[str, ShapeSpec], student: StagedDetector, teacher: Teacher | None
) -> RoIAssistant:
    """Of the teacher's architecture; without a teacher, of the one that the student's config describes."""
    if teacher is None:
        return RoIAssistant.build(cfg, shapes, student.num_classes)
    assistant = RoIAssistant.build(teacher.cfg, shapes, student.num_classes, owner="teacher")
    if cfg.MODEL.DISTILL.HEAD.ASSISTANT_INIT == "teacher":
        assistant.load(teacher.staged.roi_heads.roi_heads)
    return assistant


def _same_strides(student: StagedDetector, other: StagedDetector) -> list[str]:
    """The student's features of the strides that the other's RoI head reads, fine to coarse."""
    ours, theirs = student.feature_shapes(), other.feature_shapes()
    wanted = {theirs[name].stride for name in other.roi_heads.in_features}
    names = [name for name, shape in ours.items() if shape.stride in wanted]
    if len(names) < len(wanted):
        raise PairError(
            f"HEAD's assistant reads the strides of the teacher's RoI head, {sorted(wanted)}, but the student has "
            f"{[shape.stride for shape in ours.values()]} only; name its features in {KEY}.IN_FEATURES."
        )
    return names


def _tap(position: int, student: StagedDense) -> Tap:
    blocks = len(student.towers[student.branch_of("logits")])
    if not -1 <= position <= blocks:
        raise UserError(
            f"{KEY}.CKD_TAP is {position}; the student's classification tower has {blocks} blocks, so it must lie "
            f"between 0 and {blocks}, or be -1 for its end."
        )
    return Tap(blocks if position == -1 else position)

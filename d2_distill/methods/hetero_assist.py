"""HEAD: an assistant of the teacher's kind on the student's features, between detectors of different kinds."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage

from ..config.keys import extend_config
from ..errors import PairError, UserError
from ..staged import Run, StagedDetector
from ..teacher import Teacher
from .assist_dense import SameLevels
from .assist_rois import SharedRoIs, TracedRoIs
from .assistance import AssistSetting, mimicry_loss, recorded_sum
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import require_same_classes, require_teacher

KEY = "MODEL.DISTILL.HEAD"
PARTS = ("ASSIST", "AKD", "CKD")


@extend_config
def add_config(cfg: CfgNode) -> None:
    # A one-stage student proposes RoIs to an R-CNN assistant as MODEL.RPN.PRE_NMS_TOPK_TRAIN, POST_NMS_TOPK_TRAIN,
    # NMS_THRESH and MODEL.PROPOSAL_GENERATOR.MIN_SIZE say. The assistant is described by MODEL.ROI_HEADS and
    # MODEL.ROI_BOX_HEAD of the teacher's config or, without a teacher, of the student's.
    node = cfg.MODEL.DISTILL.HEAD = CfgNode()
    # Weight of the assistant's own losses, loss_assist.
    node.ASSIST_WEIGHT = 1.0
    # Weight of the assistant's imitation of the teacher, loss_akd; 0 leaves it out.
    node.AKD_WEIGHT = 2.0
    # Weight of the student's imitation of the teacher, loss_ckd; 0 leaves it out. With both at 0 ("assist only") and a
    # fresh assistant no teacher is needed.
    node.CKD_WEIGHT = 2.0
    # What the assistant starts from: "teacher", a copy of its head, or "fresh".
    node.ASSISTANT_INIT = "teacher"
    # Student features that an R-CNN assistant reads, fine to coarse. () is, for a one-stage student, as many of the
    # finest as the teacher's head reads (four without a teacher); for a two-stage one, those of the teacher's strides.
    node.IN_FEATURES = ()
    # CKD, one-stage students: one linear layer for each anchor of a cell instead of one for all.
    node.PER_ANCHOR = False
    # CKD, one-stage students: number of tower blocks before the features that imitate; -1 for the whole tower.
    node.CKD_TAP = -1
    # Factors on ASSIST_WEIGHT by iteration; see schedules.py.
    node.ASSIST_SCHEDULE = []
    # Factors on AKD_WEIGHT.
    node.AKD_SCHEDULE = [["Warmup", 0.02]]
    # Factors on CKD_WEIGHT.
    node.CKD_SCHEDULE = [["Warmup", 0.02]]


@DISTILL_METHOD_REGISTRY.register()
class HEAD(DistillMethod):
    """Hetero-assists distillation (Wang et al., ECCV 2022, arXiv 2207.05345).

    A detection head of the teacher's kind, the assistant, is trained on the student's features beside the student's
    own head, and is gone after training. The terms:

    - ``loss_assist``: the assistant's own losses on ground truth, which also train the student's backbone; each is
      recorded as ``assist/<name>``;
    - ``loss_akd``: features of the assistant imitate the teacher's of the same layer;
    - ``loss_ckd``: features of the student's own head imitate the teacher's, across kinds.

    Both imitations are mean squared errors behind trained linear layers or 1x1 convolutions, summed over the pairs of
    features. Without the latter two ("assist only") no teacher is needed.

    Args:
        setting: how it serves the pair; owns the assistant.
    """

    KEY = KEY
    WEIGHT_KEYS = {f"loss_{part.lower()}": f"{part}_WEIGHT" for part in PARTS}
    SCHEDULE_KEYS = {f"loss_{part.lower()}": f"{part}_SCHEDULE" for part in PARTS}
    reads_teacher = False  # with AKD or CKD it does, see __init__ and from_config

    def __init__(self, *, setting: AssistSetting, **kwargs) -> None:
        super().__init__(**kwargs)
        self.setting = setting
        self.reads_teacher = bool({"loss_akd", "loss_ckd"} & set(self.weights))

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        node = cfg.MODEL.DISTILL.HEAD
        _check_values(node)
        if node.AKD_WEIGHT or node.CKD_WEIGHT or node.ASSISTANT_INIT == "teacher":
            teacher = require_teacher(teacher, "HEAD with AKD_WEIGHT, CKD_WEIGHT or ASSISTANT_INIT 'teacher'")
        setting = _choose(student, teacher)
        if node.ASSISTANT_INIT == "teacher":
            require_same_classes(student, teacher, "HEAD with ASSISTANT_INIT 'teacher'")
        return {**arguments, "setting": setting.build(cfg, student, teacher)}

    def taps(self):
        return self.setting.taps()

    def forward(self, student: Run, teacher: Run | None) -> dict[str, torch.Tensor]:
        # The student's own head may record the same names.
        with get_event_storage().name_scope("assist"):
            assistance = self.setting(student, teacher)
            terms = {"loss_assist": recorded_sum(assistance.losses)}
        if "loss_akd" in self.weights:
            terms["loss_akd"] = mimicry_loss(assistance.akd, self.batch)
        if "loss_ckd" in self.weights:
            terms["loss_ckd"] = mimicry_loss(assistance.ckd, self.batch)
        return terms


def _check_values(node) -> None:
    if node.ASSISTANT_INIT not in ("teacher", "fresh"):
        raise UserError(f"{KEY}.ASSISTANT_INIT is {node.ASSISTANT_INIT!r}; choose 'teacher' or 'fresh'.")
    if not node.ASSIST_WEIGHT and (node.AKD_WEIGHT or node.CKD_WEIGHT):
        raise UserError(
            f"{KEY}.ASSIST_WEIGHT is 0, but AKD_WEIGHT is {node.AKD_WEIGHT} and CKD_WEIGHT {node.CKD_WEIGHT}: the "
            "assistant has to learn from the labels; raise it, or set all three to 0."
        )


def _choose(student: StagedDetector, teacher: Teacher | None) -> type[AssistSetting]:
    """The setting for a pair of these families."""
    for side, detector in (("student", student), ("teacher", teacher and teacher.staged)):
        if detector is not None and detector.family not in ("dense", "two-stage"):
            raise PairError(
                f"HEAD cannot use the {side} {detector.kind}, a {detector.family} detector; it must be a one-stage or a "
                "two-stage detector."
            )
    if teacher is not None and teacher.staged.family == "two-stage":
        if teacher.staged.roi_heads is None:
            raise PairError(
                f"HEAD cannot use the RoI heads of the teacher {' '.join([teacher.staged.kind, *teacher.staged.traits()])}; "
                "choose a teacher whose MODEL.ROI_HEADS.NAME is 'StandardROIHeads' or 'CascadeROIHeads'."
            )
    if student.family == "two-stage":
        if teacher is not None and teacher.staged.family != "two-stage":
            raise PairError(
                f"HEAD cannot use the student {student.kind} with the teacher {teacher.staged.kind}: a two-stage "
                "student needs a two-stage teacher, while a one-stage student may have either kind."
            )
        return SharedRoIs
    return SameLevels if teacher is not None and teacher.staged.family == "dense" else TracedRoIs

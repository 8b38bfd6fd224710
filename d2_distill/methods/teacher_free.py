"""TF-HEAD: a one-stage student imitates assistants of other kinds, which learn from the labels beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..assistants.dense import DenseAssistant, end_channels, tower_ends
from ..assistants.proposals import DenseProposer
from ..assistants.roi import RoIAssistant, roi_features
from ..assistants.tracing import TracedAdapter
from ..config.keys import extend_config
from ..errors import PairError, UserError
from ..staged import DenseRun, Run, StagedDense
from .assistance import mimicry_loss, recorded_sum
from .base import DISTILL_METHOD_REGISTRY, DistillMethod

KEY = "MODEL.DISTILL.TF_HEAD"


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.TF_HEAD = CfgNode()
    # Meta-architecture of the one-stage assistant, which reads its usual keys; "" for none.
    node.DENSE_ASSISTANT = "OpenMMLabFCOS"
    # Weight of the one-stage assistant's own losses, loss_assist_dense.
    node.DENSE_WEIGHT = 0.5
    # Weight of the R-CNN assistant's own losses, loss_assist_rcnn; 0 for no R-CNN assistant. See hetero_assist.py for
    # the keys that describe it and its proposals.
    node.RCNN_WEIGHT = 1.0
    # Weight of the student's imitation of the one-stage assistant, loss_cross_dense.
    node.CROSS_DENSE_WEIGHT = 1.0
    # Weight of the student's imitation of the R-CNN assistant, loss_cross_rcnn.
    node.CROSS_RCNN_WEIGHT = 1.3
    # Student features that the R-CNN assistant reads, fine to coarse; () for the four finest.
    node.IN_FEATURES = ()
    # Imitate the R-CNN assistant through one linear layer for each anchor of a cell instead of one for all.
    node.PER_ANCHOR = True
    # Factors on the weights of the assistants' own losses by iteration; see schedules.py.
    node.ASSIST_SCHEDULE = [["Warmup", 0.02]]
    # Factors on the weights of both imitations; they stop at the first drop of the published learning rate.
    node.CROSS_SCHEDULE = [["Warmup", 0.02], ["EarlyStop", 0.65]]


@DISTILL_METHOD_REGISTRY.register()
class TFHEAD(DistillMethod):
    """Teacher-free hetero-assists distillation (Wang et al., ECCV 2022, arXiv 2207.05345).

    A one-stage detector and an R-CNN head, the assistants, are trained on the student's features, and the end
    of the student's class tower imitates them. The terms, of each assistant:

    - ``loss_assist_dense``, ``loss_assist_rcnn``: the sum of its own losses on ground truth, which also train
      the student's backbone; each is recorded as ``assist_dense/<name>`` or ``assist_rcnn/<name>``;
    - ``loss_cross_dense``: mean squared error to the end of the dense assistant's class tower, summed over
      the levels, behind one 1x1 convolution for all levels;
    - ``loss_cross_rcnn``: mean squared error to the R-CNN assistant's last fully connected layer (a cascade's
      first stage) on the RoIs that the student proposed, of the tower at the positions that proposed them,
      behind a linear layer for each anchor. Ground-truth boxes among the RoIs are left out.

    The assistants get no gradient from the imitation.

    Args:
        dense, rcnn: the assistants; None for none.
        cross_dense, cross_rcnn: adapters of the imitation of each; None without.
        proposer: the student as region proposal network, for ``rcnn``.
    """

    KEY = KEY
    WEIGHT_KEYS = {
        "loss_assist_dense": "DENSE_WEIGHT",
        "loss_assist_rcnn": "RCNN_WEIGHT",
        "loss_cross_dense": "CROSS_DENSE_WEIGHT",
        "loss_cross_rcnn": "CROSS_RCNN_WEIGHT",
    }
    SCHEDULE_KEYS = {
        "loss_assist_dense": "ASSIST_SCHEDULE",
        "loss_assist_rcnn": "ASSIST_SCHEDULE",
        "loss_cross_dense": "CROSS_SCHEDULE",
        "loss_cross_rcnn": "CROSS_SCHEDULE",
    }
    reads_teacher = False

    def __init__(
        self,
        *,
        dense: DenseAssistant | None = None,
        cross_dense: nn.Conv2d | None = None,
        rcnn: RoIAssistant | None = None,
        cross_rcnn: TracedAdapter | None = None,
        proposer: DenseProposer | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.dense, self.cross_dense = dense, cross_dense
        self.rcnn, self.cross_rcnn = rcnn, cross_rcnn
        self.proposer = proposer

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        node, weights = cfg.MODEL.DISTILL.TF_HEAD, arguments["weights"]
        if student.family != "dense":
            raise PairError(
                f"TFHEAD cannot use the student {student.kind}; it must be a one-stage detector "
                "(MODEL.DISTILL.STUDENT)."
            )
        if not node.DENSE_ASSISTANT:
            weights["loss_assist_dense"] = 0.0
        _check_assistants(node, weights)
        if weights["loss_assist_dense"]:
            arguments.update(_build_dense(cfg, student))
        if weights["loss_assist_rcnn"]:
            arguments.update(_build_rcnn(cfg, student))
        return arguments

    def forward(self, student: DenseRun, teacher: Run | None = None) -> dict[str, torch.Tensor]:
        terms = {}
        if self.dense is not None:
            terms.update(self._dense_terms(student))
        if self.rcnn is not None:
            terms.update(self._rcnn_terms(student))
        return terms

    def imitate_dense(self, ours: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """``loss_cross_dense`` from the ends of student's and assistant's towers, (N, C, H, W) a level."""
        return mimicry_loss([(self.cross_dense(x), y.detach()) for x, y in zip(ours, targets)], self.batch)

    def imitate_rcnn(
        self, student: DenseRun, sampled: list[Instances], vectors: torch.Tensor
    ) -> torch.Tensor:
        """``loss_cross_rcnn`` from the assistant's vectors (R, D) of RoIs that have ``positions``."""
        return mimicry_loss([self.cross_rcnn(student, sampled, vectors.detach())], self.batch)

    def _dense_terms(self, student: DenseRun) -> dict[str, torch.Tensor]:
        with get_event_storage().name_scope("assist_dense"):
            run = self.dense(student)
            terms = {"loss_assist_dense": recorded_sum(run.losses)}
        if self.cross_dense is not None:
            ends = dict(zip(student.features, _class_ends(student)))
            ours = [ends[name] for name in self.dense.names.values()]
            terms["loss_cross_dense"] = self.imitate_dense(ours, _class_ends(run))
        return terms

    def _rcnn_terms(self, student: DenseRun) -> dict[str, torch.Tensor]:
        with get_event_storage().name_scope("assist_rcnn"):
            sampled = self.rcnn.sample(self.proposer.propose(student), student.gt_instances)
            assistance = self.rcnn(student.features, sampled, student.gt_instances)
            terms = {"loss_assist_rcnn": recorded_sum(assistance.losses)}
        if self.cross_rcnn is not None:
            vectors = assistance.stages[0].outputs.vectors[-1]
            terms["loss_cross_rcnn"] = self.imitate_rcnn(student, sampled, vectors)
        return terms


def _class_ends(run: DenseRun) -> list[torch.Tensor]:
    """Per level (N, C, H, W) behind the tower of the class logits."""
    return tower_ends(run, run.staged.branch_of("logits"))


def _check_assistants(node: CfgNode, weights: dict[str, float]) -> None:
    """Reject weights of what is not there."""
    for kind, keys in (("DENSE", "DENSE_ASSISTANT or DENSE_WEIGHT"), ("RCNN", "RCNN_WEIGHT")):
        part = kind.lower()
        if weights[f"loss_cross_{part}"] and not weights[f"loss_assist_{part}"]:
            raise UserError(
                f"{KEY}.CROSS_{kind}_WEIGHT is {weights[f'loss_cross_{part}']}, but there is no such "
                f"assistant to imitate, as {KEY}.{keys} says; set CROSS_{kind}_WEIGHT to 0 as well."
            )
    if node.DENSE_WEIGHT and not any(weights.values()):
        raise UserError(
            f"TFHEAD has no assistant: name one in {KEY}.DENSE_ASSISTANT, set {KEY}.RCNN_WEIGHT above 0, or "
            "leave TFHEAD out of MODEL.DISTILL.METHODS."
        )


def _build_dense(cfg: CfgNode, student: StagedDense) -> dict[str, Any]:
    node, adapter = cfg.MODEL.DISTILL.TF_HEAD, None
    assistant = DenseAssistant.build(cfg, node.DENSE_ASSISTANT, student, fit=True, key=f"{KEY}.DENSE_ASSISTANT")
    if node.CROSS_DENSE_WEIGHT:
        channels = [end_channels(side, side.branch_of("logits")) for side in (student, assistant.staged)]
        adapter = nn.Conv2d(*channels, 1)
    return {"dense": assistant, "cross_dense": adapter}


def _build_rcnn(cfg: CfgNode, student: StagedDense) -> dict[str, Any]:
    node, adapter = cfg.MODEL.DISTILL.TF_HEAD, None
    shapes = roi_features(student, node.IN_FEATURES, f"{KEY}.IN_FEATURES")
    assistant = RoIAssistant.build(cfg, shapes, student.num_classes)
    if node.CROSS_RCNN_WEIGHT:
        tap, out_dim = student.towers[student.branch_of("logits")].end, assistant.staged.fc_dims[-1]
        adapter = TracedAdapter(student, tap, out_dim, per_anchor=node.PER_ANCHOR)
    return {"rcnn": assistant, "cross_rcnn": adapter, "proposer": DenseProposer.from_cfg(cfg)}

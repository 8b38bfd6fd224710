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
from ..errors import PairError, UserError
from ..staged import DenseRun, Run, StagedDense
from .assistance import mimicry_loss, recorded_sum
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .schedules import build_schedule

KEY = "MODEL.DISTILL.TF_HEAD"


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

    WEIGHT_KEYS = {
        "loss_assist_dense": "TF_HEAD.DENSE_WEIGHT",
        "loss_assist_rcnn": "TF_HEAD.RCNN_WEIGHT",
        "loss_cross_dense": "TF_HEAD.CROSS_DENSE_WEIGHT",
        "loss_cross_rcnn": "TF_HEAD.CROSS_RCNN_WEIGHT",
    }

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
        node = cfg.MODEL.DISTILL.TF_HEAD
        if student.family != "dense":
            raise PairError(
                f"TFHEAD cannot use the student {student.kind}; it must be a one-stage detector "
                "(MODEL.DISTILL.STUDENT)."
            )
        weights = cls.configured_weights(cfg)
        if not node.DENSE_ASSISTANT:
            weights["loss_assist_dense"] = 0.0
        _check_assistants(node, weights)
        parts: dict[str, Any] = {}
        if weights["loss_assist_dense"]:
            parts.update(_build_dense(cfg, student))
        if weights["loss_assist_rcnn"]:
            parts.update(_build_rcnn(cfg, student))
        schedules = {
            part: build_schedule(node[f"{part}_SCHEDULE"], f"{KEY}.{part}_SCHEDULE")
            for part in ("ASSIST", "CROSS")
        }
        schedule = {term: schedules["CROSS" if "cross" in term else "ASSIST"] for term in weights}
        return {**parts, "weights": weights, "schedule": schedule}

    def forward(self, student: DenseRun, teacher: Run | None = None) -> dict[str, torch.Tensor]:
        terms = {}
        if self.dense is not None:
            terms.update(self._dense_terms(student))
        if self.rcnn is not None:
            terms.update(self._rcnn_terms(student))
        return terms

    def imitate_dense(self, ours: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """``loss_cross_dense`` from the ends of student's and assistant's towers, (N, C, H, W) a level."""
        return mimicry_loss([(self.cross_dense(x), y.detach()) for x, y in zip(ours, targets)])

    def imitate_rcnn(
        self, student: DenseRun, sampled: list[Instances], vectors: torch.Tensor
    ) -> torch.Tensor:
        """``loss_cross_rcnn`` from the assistant's vectors (R, D) of RoIs that have ``positions``."""
        return mimicry_loss([self.cross_rcnn(student, sampled, vectors.detach())])

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
    assistant = DenseAssistant.build(cfg, node.DENSE_ASSISTANT, student, key=f"{KEY}.DENSE_ASSISTANT")
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

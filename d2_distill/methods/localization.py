"""LD: the student's box distributions become the teacher's, where boxes are worth locating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from detectron2.config import CfgNode

from ..assigners import atss_thresholds
from ..config.keys import extend_config
from ..errors import PairError, UserError
from ..losses import kd_kl_div_loss
from ..regions import VALUABLE_OVERLAPS, inside_boxes, valuable_region
from ..staged import DenseRun, StagedDense
from .base import DISTILL_METHOD_REGISTRY, DistillMethod
from .pairing import require_same_classes, require_same_outputs

# Term -> its node of MODEL.DISTILL.LD.
NODES = {"loss_ld": "MAIN_LD", "loss_ld_vlr": "VLR_LD", "loss_kd": "MAIN_KD", "loss_kd_vlr": "VLR_KD"}
Rows = tuple[torch.Tensor, torch.Tensor]  # image and anchor index of each row


@dataclass(frozen=True)
class ValuableRegion:
    """How the valuable localisation region is found, see ``MODEL.DISTILL.LD.VLR``."""

    inside_box: bool
    gamma: float
    overlap: str
    binary: bool
    exclude_positives: bool

    def values(self, run: DenseRun, confidence: Callable[[], torch.Tensor]) -> torch.Tensor:
        """(N, R) weight of each anchor, 0 outside of the region.

        Args:
            run: the student's.
            confidence: gives the highest class score (N, R) of each anchor.
        """
        grid, truth = run.grid, run.truth
        if self.inside_box:
            inside = inside_boxes(grid.centers, truth.boxes, truth.valid)
            values = inside if self.binary else inside * confidence()
        else:
            thresholds = run.assignment.thresholds
            if thresholds is None:  # the student assigns otherwise than by ATSS
                thresholds = atss_thresholds(
                    grid.boxes, grid.level_sizes, truth.boxes, grid.valid, valid_boxes=truth.valid
                )
            values = valuable_region(
                grid.boxes, truth.boxes, truth.valid, thresholds, grid.valid, self.gamma, self.overlap
            )
            values = values > 0 if self.binary else values
        if self.inside_box or self.exclude_positives:
            values = values * ~run.assignment.foreground
        return values.to(grid.boxes.dtype)


@extend_config
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILL.LD = CfgNode()
    # A WEIGHT and a TEMPERATURE, which softens the distributions, of each term: of the box distributions (LD) or the
    # classes (KD), on the positives (MAIN) or on the valuable localization region around them (VLR).
    for name, weight, temperature in (
        ("MAIN_LD", 0.25, 10.0),
        ("VLR_LD", 0.0625, 10.0),
        ("MAIN_KD", 10.0, 2.0),
        ("VLR_KD", 0.0, 2.0),
    ):
        node[name] = CfgNode({"WEIGHT": weight, "TEMPERATURE": temperature})
    # LD terms are sums over the batch; the published weights belong to 3 images per GPU. Scale the sums to this many
    # images, whatever the batch; 0 does not scale them (the published code, whose weights then depend on the batch).
    node.REFERENCE_IMAGES = 3
    # KD terms are means over the classes; the published weights belong to the 80 of COCO, 20 in the VOC configs. Divide
    # by this many classes, however many there are; 0 is the mean (the published code, whose weights then depend on the
    # number of classes).
    node.REFERENCE_CLASSES = 80
    # Softmax over the bins of each "edge", or over all box outputs of an "anchor" (the published RetinaNet).
    node.SOFTMAX = "edge"
    node.VLR = CfgNode()
    # "overlap": anchors whose overlap with a box is between GAMMA times its ATSS threshold and the threshold;
    # "inside_box": all anchors inside a box that are not positive; "auto": the latter for FCOS, else the former.
    node.VLR.REGION = "auto"
    # "overlap": lower end of the region, as a part of the ATSS threshold.
    node.VLR.GAMMA = 0.25
    # "overlap": "iof", the published code's intersection over anchor, or "union", the paper's DIoU.
    node.VLR.OVERLAP = "iof"
    # Weigh all anchors of the region equally (the paper), not by their IoU ("overlap") or the student's score
    # ("inside_box").
    node.VLR.BINARY = False
    # Leave the positives out of the region (the published RetinaNet); "inside_box" always does.
    node.VLR.EXCLUDE_POSITIVES = False
    # Factors on all weights by iteration; see schedules.py.
    node.SCHEDULE = []


@DISTILL_METHOD_REGISTRY.register()
class LD(DistillMethod):
    """Localisation distillation (Zheng et al., CVPR 2022, arXiv 2102.12252; TPAMI 2023, arXiv 2204.05957).

    Every term is a softened Kullback-Leibler divergence between rows of the student's and the teacher's raw
    outputs, T^2 times its mean over the entries of a row (:func:`~d2_distill.losses.kd_kl_div_loss`):

    - ``loss_ld``: the box distributions of the positive anchors, averaged over the four sides, weighted by the
      student's highest class score;
    - ``loss_ld_vlr``: those of the valuable localisation region, weighted by the region's values;
    - ``loss_kd``, ``loss_kd_vlr``: the class logits of the positives and of the region, averaged over the
      anchors of a level and summed over the levels.

    The LD terms are sums over the batch; ``reference_images`` frees them of its size, and ``reference_classes`` the KD
    terms of the number of classes.

    Args:
        temperatures: term name -> T.
        reference_images: images that the sums are scaled to; 0 leaves them as they are.
        reference_classes: classes that the means over classes are scaled to; 0 leaves them as they are.
        joint_softmax: one distribution over all box outputs of an anchor, instead of one a side.
        valuable: how the valuable localisation region is found.
    """

    KEY = "MODEL.DISTILL.LD"
    WEIGHT_KEYS = {term: f"{name}.WEIGHT" for term, name in NODES.items()}

    def __init__(
        self,
        *,
        temperatures: dict[str, float],
        reference_images: int,
        reference_classes: int,
        joint_softmax: bool,
        valuable: ValuableRegion,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.temperatures = temperatures
        self.reference_images = reference_images
        self.reference_classes = reference_classes
        self.joint_softmax = joint_softmax
        self.valuable = valuable

    @classmethod
    def from_config(cls, cfg, student, teacher) -> dict[str, Any]:
        arguments = super().from_config(cfg, student, teacher)
        node = cfg.MODEL.DISTILL.LD
        _check_pair(student, teacher.staged, on_boxes=bool(node.MAIN_LD.WEIGHT or node.VLR_LD.WEIGHT))
        if node.MAIN_KD.WEIGHT or node.VLR_KD.WEIGHT:
            require_same_classes(student, teacher, "LD's MAIN_KD or VLR_KD")
        for name, value, choices in (
            ("SOFTMAX", node.SOFTMAX, ("edge", "anchor")),
            ("VLR.REGION", node.VLR.REGION, ("auto", "overlap", "inside_box")),
            ("VLR.OVERLAP", node.VLR.OVERLAP, tuple(VALUABLE_OVERLAPS)),
        ):
            if value not in choices:
                raise UserError(f"{cls.KEY}.{name} is {value!r}; choose from {', '.join(choices)}.")
        for name in NODES.values():
            if node[name].TEMPERATURE <= 0:
                raise UserError(
                    f"{cls.KEY}.{name}.TEMPERATURE is {node[name].TEMPERATURE}; it must be positive."
                )
        return {**arguments, **cls.arguments(node, student)}

    @staticmethod
    def arguments(node: CfgNode, student: StagedDense) -> dict[str, Any]:
        """Return the arguments of the constructor except weights and schedule, from a checked ``MODEL.DISTILL.LD``."""
        region = node.VLR.REGION
        return {
            "temperatures": {term: node[name].TEMPERATURE for term, name in NODES.items()},
            "reference_images": node.REFERENCE_IMAGES,
            "reference_classes": node.REFERENCE_CLASSES,
            "joint_softmax": node.SOFTMAX == "anchor",
            "valuable": ValuableRegion(
                inside_box=student.assigns_points if region == "auto" else region == "inside_box",
                gamma=node.VLR.GAMMA,
                overlap=node.VLR.OVERLAP,
                binary=node.VLR.BINARY,
                exclude_positives=node.VLR.EXCLUDE_POSITIVES,
            ),
        }

    def forward(self, student: DenseRun, teacher: DenseRun) -> dict[str, torch.Tensor]:
        outputs, targets = student.outputs, teacher.outputs

        def confidence(rows=slice(None)) -> torch.Tensor:
            with torch.no_grad():
                of_rows = {name: output[rows] for name, output in outputs.items()}
                return student.staged.class_scores(of_rows).amax(dim=-1)

        terms = {}
        if {"loss_ld", "loss_kd"} & set(self.weights):
            rows = student.assignment.positives
            if "loss_ld" in self.weights:
                terms["loss_ld"] = self._boxes("loss_ld", outputs, targets, rows, confidence(rows))
            if "loss_kd" in self.weights:
                terms["loss_kd"] = self._classes("loss_kd", student, outputs, targets, rows)
        if {"loss_ld_vlr", "loss_kd_vlr"} & set(self.weights):
            values = self.valuable.values(student, confidence)
            rows = values.nonzero(as_tuple=True)
            if "loss_ld_vlr" in self.weights:
                terms["loss_ld_vlr"] = self._boxes("loss_ld_vlr", outputs, targets, rows, values[rows])
            if "loss_kd_vlr" in self.weights:
                terms["loss_kd_vlr"] = self._classes("loss_kd_vlr", student, outputs, targets, rows)
        return terms

    def _boxes(self, term, outputs, targets, rows: Rows, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum over the rows of the divergence of their box distributions."""
        sides = 1 if self.joint_softmax else 4
        ours, theirs = (x["deltas"][rows].float().unflatten(-1, (sides, -1)) for x in (outputs, targets))
        divergence = kd_kl_div_loss(ours, theirs, self.temperatures[term], class_reduction="mean")
        images = len(outputs["deltas"])
        scale = self.reference_images / images if self.reference_images else 1.0
        return (divergence.mean(dim=-1) * weights).sum() * scale

    def _classes(self, term, student: DenseRun, outputs, targets, rows: Rows) -> torch.Tensor:
        """Sum over the levels of the mean over a level's rows of the divergence of their class logits."""
        ours, theirs = (x["logits"][rows].float() for x in (outputs, targets))
        scores = min(ours.shape[-1], theirs.shape[-1])  # GFLv2 has one that is no class
        divergence = kd_kl_div_loss(
            ours[:, :scores], theirs[:, :scores], self.temperatures[term], class_reduction="mean"
        )
        levels = range(len(student.grid.strides))
        in_level = student.grid.per_anchor(levels)[rows[1]] == torch.arange(len(levels), device=divergence.device)[:, None]
        counts = self.batch.at_least_one(self.batch.mean(in_level.sum(dim=1)))
        scale = scores / self.reference_classes if self.reference_classes else 1.0
        return ((divergence * in_level).sum(dim=1) / counts).sum() * scale


def _check_pair(student, teacher, on_boxes: bool) -> None:
    for side, detector in (("student", student), ("teacher", teacher)):
        if detector.family != "dense" or (on_boxes and detector.reg_max is None):
            raise PairError(
                f"LD cannot use the {side} {detector.kind} (student {student.kind}, teacher {teacher.kind}): it "
                "distils boxes that are predicted as distributions; use GFL or GFLv2, or ATSS, OpenMMLabFCOS or "
                "OpenMMLabRetinaNet with REG_MAX above 0 in MODEL.ATSS, MODEL.FCOS or MODEL.RETINANET."
            )
    if on_boxes and student.reg_max != teacher.reg_max:
        raise PairError(
            f"LD compares distributions bin by bin, but the student's REG_MAX is {student.reg_max} and the "
            f"teacher's {teacher.reg_max}; make them equal."
        )
    require_same_outputs(student, teacher, "LD")

"""A one-stage detector as assistant: its head and losses on the features of a student."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import reduce
from operator import getitem

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..detectors.building import build_detector, num_classes_key
from ..errors import UserError
from ..staged import DenseRun, StagedDense, StagedDetector, adapter_of, family_of, stage_detector
from .copying import copy_weights

logger = logging.getLogger(__name__)
# Of all dense heads, Detectron2's included.
DEFAULT_LEVELS = ["p3", "p4", "p5", "p6", "p7"]


@BACKBONE_REGISTRY.register()
class StudentFeatures(Backbone):
    """Stands in for the backbone of a detector that is given its features: their shapes, and no weights.

    It is selected by :meth:`DenseAssistant.build`, which writes ``MODEL.STUDENT_FEATURES``: name, channels
    and stride of each.
    """

    def __init__(self, cfg: CfgNode, input_shape) -> None:
        super().__init__()
        self._shapes = {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, channels, stride in cfg.MODEL.STUDENT_FEATURES
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError("an assistant is given the features of its student")


class DenseAssistant(nn.Module):
    """A one-stage detector without a backbone, trained on a student's features beside the student's own head.

    Args:
        detector: it has no parameters but those of its head.
        names: its name of a feature -> the student's, of those that it reads.
    """

    def __init__(self, detector: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.detector = detector
        self.staged: StagedDense = stage_detector(detector)
        self.names = dict(names)

    @classmethod
    def build(
        cls,
        cfg: CfgNode,
        kind: str,
        student: StagedDetector,
        *,
        names: Mapping[str, str] | None = None,
        fit: bool = False,
        key: str,
    ) -> "DenseAssistant":
        """The head that a config describes, for the student's features and classes.

        Args:
            cfg: its backbone is not built.
            kind: meta-architecture of a one-stage detector.
            names: the config's name of a feature -> the student's; None if they are the same.
            fit: where the config has the default levels, and the student does not have all of them, read the student's.
            key: config key of ``kind``, for error messages.

        Raises:
            UserError: ``kind`` is something else, or the head reads a feature that is not among the
                student's.
        """
        if family_of(kind) != "dense" or adapter_of(META_ARCH_REGISTRY.get(kind)).is_wrapper:
            raise UserError(
                f"{key} is {kind!r}, which is no one-stage detector; choose one such as RetinaNet, "
                "OpenMMLabFCOS or GFL."
            )
        shapes = student.feature_shapes()
        names = dict(names or zip(shapes, shapes))
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = kind
        cfg.MODEL.STUDENT_FEATURES = [
            [name, shapes[ours].channels, shapes[ours].stride] for name, ours in names.items()
        ]
        cfg.MODEL.BACKBONE.NAME = StudentFeatures.__name__
        cfg.MODEL.BACKBONE.FIXED_BN_STATISTICS = False
        # It never detects, and need not know the student's kind of non-maximum suppression.
        cfg.TEST.NMS = "nms"
        cfg.merge_from_list([num_classes_key(cfg), student.num_classes])
        if fit:
            _fit_levels(cfg, list(names))
        try:
            detector = build_detector(cfg)
        except KeyError as error:
            raise UserError(
                f"The assistant {kind} reads the feature {error}, which the student's head ({student.kind}) "
                f"does not; set the assistant's IN_FEATURES to some of {', '.join(names)}."
            ) from error
        return cls(detector, {name: names[name] for name in stage_detector(detector).in_features})

    def load(self, teacher: nn.Module) -> None:
        """Copy the head of a detector of the same kind.

        Raises:
            UserError: it is of another shape.
        """
        copy_weights(self.detector, teacher)

    def forward(self, student: DenseRun) -> DenseRun:
        """A run of the assistant on the features and the ground truth of the student's run."""
        run = self.staged.run(student.images, student.gt_instances)
        # A stage that is set is not computed.
        run.features = {name: student.features[ours] for name, ours in self.names.items()}
        return run


def _fit_levels(cfg: CfgNode, names: list[str]) -> None:
    """Let a head whose levels are the default ones read these, if it cannot read those, and FCOS divide the sizes so."""
    path = num_classes_key(cfg).rpartition(".")[0]
    node = reduce(getitem, path.split("."), cfg)
    if list(node.IN_FEATURES) != DEFAULT_LEVELS or set(DEFAULT_LEVELS) <= set(names):
        return
    changed = {"IN_FEATURES": names}
    if "SIZES_OF_INTEREST" in node:
        changed["SIZES_OF_INTEREST"] = node.SIZES_OF_INTEREST[: len(names) - 1]
    node.update(changed)
    logger.info(
        "The student has no such levels, so the assistant %s gets %s.", cfg.MODEL.META_ARCHITECTURE,
        " and ".join(f"{path}.{key} {value}" for key, value in changed.items()),
    )


def tower_ends(run: DenseRun, branch: str) -> list[torch.Tensor]:
    """Per level (N, C, H, W) behind a whole tower."""
    return run.taps[branch][run.staged.towers[branch].end]


def end_channels(staged: StagedDense, branch: str) -> int:
    """Channels of :func:`tower_ends`."""
    return staged.tap_channels(branch, len(staged.towers[branch]))

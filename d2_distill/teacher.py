"""The frozen teacher: a Detectron2 model of its own config file and weights, outside the module tree."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList, Instances
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint.exact import load_exactly
from .config.class_names import ALIASES_KEY, describe_match, listed, match_classes
from .config.model_zoo import checkpoint_url, find_config
from .config.pretrained import with_pretrained_inputs
from .config.reading import read_config
from .config.rules import check_config
from .data.classes import dataset_classes, with_classes
from .detectors.building import build_detector, num_classes_key
from .errors import UserError
from .layers.memory_format import in_fast_layout
from .staged import Run, StagedDetector, Taps, stage_detector

logger = logging.getLogger(__name__)


class Teacher:
    """A guest of the distiller: not a module, so absent from its parameters, state dict and DDP buckets.

    Args:
        model: the detector; it is put in eval mode and its parameters stop requiring gradient.
        input_format: channel order of its images ("BGR", "RGB").
        classes: names of its classes, empty if unknown.
        lacks: names of the student's classes that it does not know.
        cfg: config that the model was built from, for methods that build parts of its architecture.
        batch_statistics: its batch norms use, and update, the statistics of each batch nevertheless.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str,
        classes: Sequence[str] = (),
        lacks: Sequence[str] = (),
        cfg: CfgNode | None = None,
        batch_statistics: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        self.staged = stage_detector(model)
        self.input_format = input_format
        self.classes = classes
        self.lacks = lacks
        self.cfg = cfg

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Teacher" | None:
        """Build and load the teacher of ``MODEL.DISTILL.TEACHER``; None if no config file is named.

        Of its classes only those of the student are kept, in the student's order, if it knows all of them by name.

        Raises:
            UserError: its config file or weights are missing, the weights do not fit the model exactly, or
                ``CLASS_ALIASES`` cannot be.
        """
        if not cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
            return None
        teacher = cls._build(cfg, teacher_config(cfg), trained=True)
        model, weights = teacher.model, teacher.cfg.MODEL.WEIGHTS
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info(
            "Teacher: %s with %.1fM parameters from %s, fingerprint %s",
            teacher.staged.kind, millions, weights, teacher.fingerprint(),
        )
        return teacher

    @classmethod
    def untrained(cls, cfg: CfgNode) -> "Teacher" | None:
        """The same without its weights, which need not exist: to ask what it could teach."""
        if not cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
            return None
        return cls._build(cfg, teacher_config(cfg, trained=False), trained=False)

    @classmethod
    def _build(cls, cfg: CfgNode, teacher_cfg: CfgNode, *, trained: bool) -> "Teacher":
        model = build_detector(teacher_cfg)
        if trained:
            load_exactly(model, teacher_cfg.MODEL.WEIGHTS, key="MODEL.DISTILL.TEACHER.WEIGHTS")
        classes, lacks = _take_classes(cfg, teacher_cfg, stage_detector(model))
        return cls(
            in_fast_layout(model),
            input_format=teacher_cfg.INPUT.FORMAT,
            classes=classes,
            lacks=lacks,
            cfg=teacher_cfg,
            batch_statistics=cfg.MODEL.DISTILL.TEACHER.BATCH_STATISTICS,
        )

    def fingerprint(self) -> str:
        """Hash of the names and bytes of all tensors of the model."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def run(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        student_images: ImageList,
        *,
        student_format: str,
        normalises_alike: bool,
        gt_instances: list[Instances] | None = None,
        taps: Taps | None = None,
    ) -> Run:
        """Start a frozen run on the student's batch; nothing is computed before a method reads it.

        Args:
            normalises_alike: whether the student's batch can be used as it is, see :meth:`normalises_like`.
        """
        if self.staged.device != student_images.tensor.device:
            self.model.to(student_images.tensor.device)
        divisibility = self.staged.size_divisibility
        if normalises_alike and all(side % divisibility == 0 for side in student_images.tensor.shape[-2:]):
            images = student_images
        else:
            images = self.staged.preprocess(self.in_own_format(batched_inputs, student_format))
        return self.staged.run(images, gt_instances, taps=taps, frozen=True)

    def normalises_like(self, student: StagedDetector, student_format: str) -> bool:
        """Whether both models make the same tensor of an image; to be asked once, since a GPU has to wait."""
        statistics = zip(self.staged.pixel_statistics, student.pixel_statistics)
        return self.input_format == student_format and all(torch.equal(x.cpu(), y.cpu()) for x, y in statistics)

    def in_own_format(self, batched_inputs, student_format: str):
        """The student's dataset dicts with the teacher's channel order."""
        if self.input_format == student_format:
            return batched_inputs
        # "BGR" and "RGB" are each other's flip; teacher_config admits no other pair.
        return [{**inputs, "image": inputs["image"].flip(0)} for inputs in batched_inputs]


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """Return the config of :func:`read_teacher_config` with the classes of its own data.

    A teacher may come without its data: its config then has to tell the number of classes, or ``DATASETS.CLASSES``.

    Raises:
        UserError: see :func:`read_teacher_config`.
    """
    return with_classes(read_teacher_config(cfg, trained=trained))


def read_teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """Return the teacher's own config, from the student's ``MODEL.DISTILL.TEACHER``.

    Without weights of its own a name of Detectron2's model zoo means the zoo's trained checkpoint, not what the zoo's
    config initialises the training with.

    Raises:
        UserError: the config file is missing or not a valid config, or there are no weights although ``trained``.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    source = f"MODEL.DISTILL.TEACHER: {node.CONFIG_FILE} with the overrides OPTS"
    is_file = PathManager.isfile(node.CONFIG_FILE)
    path = find_config(node.CONFIG_FILE, key="MODEL.DISTILL.TEACHER.CONFIG_FILE")
    teacher_cfg = read_config(path, node.OPTS, source=source)
    check_config(teacher_cfg, source=source)
    teacher_cfg = with_pretrained_inputs(teacher_cfg, config_file=path, opts=node.OPTS, trained=True)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    if node.WEIGHTS:
        teacher_cfg.MODEL.WEIGHTS = node.WEIGHTS
    elif trained and not is_file and "MODEL.WEIGHTS" not in node.OPTS[::2]:
        teacher_cfg.MODEL.WEIGHTS = checkpoint_url(node.CONFIG_FILE, key="MODEL.DISTILL.TEACHER.WEIGHTS")
    if trained and not teacher_cfg.MODEL.WEIGHTS:
        raise UserError(
            "MODEL.DISTILL.TEACHER.WEIGHTS is empty and so is MODEL.WEIGHTS of the teacher's config; "
            "an untrained teacher teaches nothing: name its checkpoint."
        )
    ours, theirs = cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT
    if ours != theirs and {ours, theirs} != {"BGR", "RGB"}:
        raise UserError(
            f"INPUT.FORMAT is {ours} for the student and {theirs} for the teacher; "
            "only BGR and RGB can be converted into each other."
        )
    return teacher_cfg


def _take_classes(
    cfg: CfgNode, teacher_cfg: CfgNode, staged: StagedDetector
) -> tuple[Sequence[str], Sequence[str]]:
    """Make the teacher know the student's classes only, in model and config, if it knows all of them.

    Returns:
        Names of its classes afterwards, empty if unknown; names of those of the student that it does not know.
    """
    ours, theirs, aliases = dataset_classes(cfg), dataset_classes(teacher_cfg), cfg.MODEL.DISTILL.TEACHER.CLASS_ALIASES
    if aliases and not (ours and theirs):
        raise UserError(
            f"{ALIASES_KEY} is set, but the class names of the {'student' if theirs else 'teacher'} are not "
            "known; name them in DATASETS.CLASSES of its config."
        )
    if not (ours and theirs) or ours == theirs:
        return theirs, ()
    found = match_classes(ours, theirs, aliases)
    lacks = [name for name, index in zip(ours, found) if index is None]
    summary = describe_match(ours, theirs, found)
    if lacks:
        logger.warning(
            "Teacher: it has %s, but not %s; methods that compare classes cannot use it.", summary, ", ".join(lacks)
        )
        return theirs, lacks
    try:
        staged.keep_classes(found)
    except NotImplementedError:
        if len(theirs) == len(ours):
            raise UserError(
                f"The teacher {staged.kind} has the student's classes in another order, and its staged adapter defines no "
                "keep_classes to sort them; define it, or put DATASETS.CLASSES of the student's config in the teacher's "
                f"order: {listed(theirs)}."
            ) from None
        logger.warning(
            "Teacher: it has %s, but %s cannot be reduced to them, as its staged adapter defines no keep_classes; methods "
            "that compare classes cannot use it.", summary, staged.kind,
        )
        return theirs, ()
    teacher_cfg.merge_from_list(["DATASETS.CLASSES", tuple(ours), num_classes_key(teacher_cfg), len(ours)])
    logger.info("Teacher: %s", summary)
    return ours, ()

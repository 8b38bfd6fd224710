"""The meta-architecture that trains a student with the help of a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Callable, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn

from .detectors.building import build_detector
from .errors import UserError
from .methods import build_methods
from .methods.gradient_ratio import WeightedTerm, feature_gradients, report_ratios, scalar_name
from .methods.pairing import require_teacher
from .staged import Run, StagedDetector, Taps, stage_detector
from .teacher import Teacher

logger = logging.getLogger(__name__)

# Group of the scalars that tell the weights of terms with a schedule.
WEIGHT_SCALARS = "distill_weight"
# Training steps of this process in which every term is checked for finiteness and for a path to the student.
CHECKED_STEPS = 3

# A teacher, if the methods need one, and the methods by name.
Teaching = Tuple[Optional[Teacher], nn.ModuleDict]


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """In training the student's losses and one named scalar a distillation term, else the plain student.

    Its state dict is the student's, so each of its checkpoints is one of the plain student. The teacher is held outside
    the module tree.

    Built from a config, it is the student alone until :meth:`prepare_training`, or else the first training step, builds
    teacher and methods. So evaluation needs neither.

    Args:
        student: any detector with a staged adapter.
        teacher: None for methods that need none.
        methods: name -> :class:`~d2_distill.methods.DistillMethod`.
        input_format: channel order of the student's images.
        build_teaching: builds teacher and methods for the student when training starts, in place of those given.
        inherited: what the student starts with from the teacher, see :func:`inherit`.
        gradient_ratio_period: iterations between two reports of :mod:`~d2_distill.methods.gradient_ratio`; 0 for none.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        methods: nn.ModuleDict | None = None,
        input_format: str,
        build_teaching: Callable[[StagedDetector], Teaching] | None = None,
        inherited: Sequence[str] = (),
        gradient_ratio_period: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.staged = stage_detector(student)
        self.input_format = input_format
        self.inherited = inherited
        self.gradient_ratio_period = gradient_ratio_period
        self._unchecked_steps = CHECKED_STEPS
        self._build_teaching = build_teaching
        self._take(teacher, nn.ModuleDict() if methods is None else methods)
        if build_teaching is None:
            self.inherit()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "student": build_detector(cfg),
            "build_teaching": partial(_teaching_of, cfg.clone()),
            "input_format": cfg.INPUT.FORMAT,
            "inherited": tuple(cfg.MODEL.DISTILL.INHERIT),
            "gradient_ratio_period": cfg.MODEL.DISTILL.GRADIENT_RATIO_PERIOD,
        }

    def prepare_training(self) -> Distiller:
        """Build the teacher and the methods, whose adapters an optimizer built afterwards trains; return self.

        Further calls change nothing.

        Raises:
            UserError: the teacher cannot be built or loaded, or a method cannot serve this pair.
        """
        if self._build_teaching is not None:
            self._take(*self._built())
            self.inherit()
            self._build_teaching = None
        return self

    def _prepare_late(self, iteration: int) -> None:
        """Prepare in the first training step of a trainer that does not know of :meth:`prepare_training`.

        Raises:
            UserError: there are adapters, which such a trainer has neither in its optimizer nor in its checkpoints.
        """
        teacher, methods = self._built()
        adapted = [name for name, method in methods.items() if any(p.requires_grad for p in method.parameters())]
        if adapted:
            raise UserError(
                f"MODEL.DISTILL.METHODS: {', '.join(adapted)} trains layers of its own, which this trainer would neither "
                "train nor save; use d2_distill.engine.Trainer (train_net.py), or, in a training loop of your own, call "
                "the distiller's prepare_training() before you build the optimizer."
            )
        self._take(teacher, methods)
        if iteration == 0:  # a resumed run has what it inherited
            self.inherit()
        self._build_teaching = None

    def _built(self) -> Teaching:
        # The initialisation of teacher and adapters must not shift the random numbers of plain training.
        # Models are made on the CPU; forking GPU generators as well would open every GPU of the machine.
        with torch.random.fork_rng(devices=[]):
            return self._build_teaching(self.staged)

    def _take(self, teacher: Teacher | None, methods: nn.ModuleDict) -> None:
        self.teacher = teacher
        self.methods = methods.to(self.device).train(self.training)
        self._normalises_alike = teacher is not None and teacher.normalises_like(self.staged, self.input_format)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the student's, with its names. That of the adapters is ``methods.state_dict()``."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`state_dict` returns, or any checkpoint of the plain student."""
        return self.student.load_state_dict(state_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # fvcore's checkpointer gets the module of each name in the state dict whose shape differs.
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None or name not in student._modules:
                raise
            return student._modules[name]

    def inherit(self) -> None:
        """Give the student what it inherits. To be called again when other weights were loaded into it."""
        if not self.inherited:
            return
        teacher = require_teacher(self.teacher, "MODEL.DISTILL.INHERIT")
        inherit(self.student, teacher.model, self.inherited)
        logger.info(
            "The student starts with the teacher's weights (fingerprint %s) in %s",
            teacher.fingerprint(), ", ".join(self.inherited),
        )

    @property
    def device(self) -> torch.device:
        return self.staged.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]):
        """Detectron2's contract: a dict of losses in training, the student's detections in evaluation."""
        if not self.training:
            return self.student(batched_inputs)
        if self._build_teaching is not None:
            self._prepare_late(get_event_storage().iter)
        images = self.staged.preprocess(batched_inputs)
        gt_instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
        taps = self._wanted_taps()
        student = self.staged.run(images, gt_instances, taps=taps)
        losses = dict(student.losses)
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher.run(
                batched_inputs, images, student_format=self.input_format,
                normalises_alike=self._normalises_alike, gt_instances=gt_instances, taps=taps,
            )
        losses.update(self._distill(student, teacher))
        self._unchecked_steps = max(self._unchecked_steps - 1, 0)
        return losses

    def _wanted_taps(self) -> Taps:
        wanted: dict[str, frozenset] = {}
        for method in self.methods.values():
            for branch, positions in method.taps().items():
                wanted[branch] = wanted.get(branch, frozenset()) | positions
        return wanted

    def _distill(self, student: Run, teacher: Run | None) -> dict[str, torch.Tensor]:
        storage = get_event_storage()
        features = list(student.features.values())
        period = self.gradient_ratio_period
        is_due = period > 0 and (storage.iter + 1) % period == 0
        losses: dict[str, torch.Tensor] = {}
        measured: list[WeightedTerm] = []
        for name, method in self.methods.items():
            for term, value in method(student, teacher).items():
                if self._unchecked_steps:
                    _check_term(name, term, value, features)
                weight = method.weight_at(term, storage.iter)
                losses[term] = value * weight
                if method.is_scheduled(term):
                    storage.put_scalar(scalar_name(WEIGHT_SCALARS, term), weight, smoothing_hint=False)
                if is_due:
                    measured.append(method.weighted_term(term, value, storage.iter))
        if measured:
            report_ratios(list(student.losses.values()), measured, features)
        return losses


def _teaching_of(cfg: CfgNode, student: StagedDetector) -> Teaching:
    """Build what a config teaches the student with."""
    teacher = Teacher.from_config(cfg)
    return teacher, build_methods(cfg, student, teacher)


def inherit(student: nn.Module, teacher: nn.Module, entries: Sequence[str]) -> None:
    """Copy the teacher's parameters and buffers below each dotted prefix into the student.

    Args:
        entries: prefixes; "student's=teacher's" where they differ.

    Raises:
        UserError: the student has no such module, or a tensor is missing or of another shape in the teacher.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    for entry in entries:
        prefix, _, source = entry.partition("=")
        source = source or prefix
        names = [name for name in ours if name.startswith(f"{prefix}.")]
        if not names:
            raise UserError(
                f"MODEL.DISTILL.INHERIT has {prefix!r}, which is no module with weights in the student; "
                f"name one of them, such as {', '.join(top for top, _ in student.named_children())}."
            )
        for name in names:
            other = source + name[len(prefix) :]
            if other not in theirs or theirs[other].shape != ours[name].shape:
                shape = tuple(theirs[other].shape) if other in theirs else "missing"
                raise UserError(
                    f"MODEL.DISTILL.INHERIT has {entry!r}, but {name} is {tuple(ours[name].shape)} in the "
                    f"student and {shape} in the teacher ({other}); inherit only modules that are equal on "
                    "both sides."
                )
            ours[name].copy_(theirs[other])


def _check_term(method: str, term: str, value: torch.Tensor, features: list[torch.Tensor]) -> None:
    """A silent or broken term must stop the run in its first steps."""
    if not torch.isfinite(value):
        raise UserError(
            f"MODEL.DISTILL.METHODS: {method} gives {term} = {value.item()} in the first steps; check the "
            "teacher's weights and the pixel statistics (INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD) of "
            "both configs."
        )
    if all(gradient is None for gradient in feature_gradients(value, features)):
        raise UserError(
            f"MODEL.DISTILL.METHODS: the gradient of {method}'s {term} does not reach the student's "
            "features, so it teaches nothing; leave the method out or mend it."
        )

"""The meta-architecture that trains a student with the help of a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn

from .detectors.building import build_detector
from .errors import UserError
from .methods import DistillMethod, build_methods
from .methods.gradient_ratio import WeightedTerm, report_ratios, scalar_name
from .methods.pairing import require_teacher
from .methods.terms import check_value, require_complete, require_declared, require_own_names
from .staged import Run, Taps, stage_detector
from .teacher import Teacher

logger = logging.getLogger(__name__)

# Group of the scalars that tell the weights of terms with a schedule.
WEIGHT_SCALARS = "distill_weight"
# Training steps of this process in which every term is checked: returned, finite, and with a path to the student.
CHECKED_STEPS = 3


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """In training, return the student's losses and one named scalar per distillation term; else be the plain student.

    A method that has ended (:meth:`~d2_distill.methods.DistillMethod.has_ended`) is skipped, and its terms are 0. The
    teacher runs as long as a method reads it.

    The teacher is held outside the module tree. Checkpoints are those of ``student`` (engine/trainer.py).

    Args:
        student: any detector with a staged adapter.
        teacher: None for methods that need none.
        methods: name -> :class:`~d2_distill.methods.DistillMethod`.
        input_format: channel order of the student's images.
        inherited: what the student starts with from the teacher, see :func:`inherit`.
        gradient_ratio_period: iterations between two reports of :mod:`~d2_distill.methods.gradient_ratio`; 0 for none.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None,
        methods: nn.ModuleDict,
        input_format: str,
        inherited: Sequence[str] = (),
        gradient_ratio_period: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.staged = stage_detector(student)
        self.teacher = teacher
        self.methods = methods
        self.input_format = input_format
        self._normalises_alike = teacher is not None and teacher.normalises_like(student, input_format)
        self._unchecked_steps = CHECKED_STEPS
        self._logged_ends: set[str] = set()
        self.inherited = inherited
        self.gradient_ratio_period = gradient_ratio_period
        self.inherit()

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        student = build_detector(cfg)
        # The initialisation of teacher and adapters must not shift the random numbers of plain training.
        # Models are made on the CPU; forking GPU generators as well would open every GPU of the machine.
        with torch.random.fork_rng(devices=[]):
            teacher = Teacher.from_config(cfg)
            methods = build_methods(cfg, stage_detector(student), teacher)
        return {
            "student": student,
            "teacher": teacher,
            "methods": methods,
            "input_format": cfg.INPUT.FORMAT,
            "inherited": tuple(cfg.MODEL.DISTILL.INHERIT),
            "gradient_ratio_period": cfg.MODEL.DISTILL.GRADIENT_RATIO_PERIOD,
        }

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
        return self.student.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]):
        """Return a dict of losses in training and the student's detections in evaluation, as Detectron2 expects."""
        if not self.training:
            return self.student(batched_inputs)
        images = self.staged.preprocess(batched_inputs)
        gt_instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
        running = self._running_methods(get_event_storage().iter)
        taps = wanted_taps(running.values())
        student = self.staged.run(images, gt_instances, taps=taps)
        losses = dict(student.losses)
        teacher = None
        if self.teacher is not None and reads_teacher(running.values()):
            teacher = self.teacher.run(
                batched_inputs, images, student_format=self.input_format,
                normalises_alike=self._normalises_alike, gt_instances=gt_instances, taps=taps,
            )
        losses.update(self._distill(student, teacher, running))
        self._unchecked_steps = max(self._unchecked_steps - 1, 0)
        return losses

    def _running_methods(self, iteration: int) -> dict[str, DistillMethod]:
        """Return the methods that have not ended, and log each end once."""
        running = {name: method for name, method in self.methods.items() if not method.has_ended(iteration)}
        ended = [name for name in self.methods if name not in running and name not in self._logged_ends]
        if ended:
            self._logged_ends.update(ended)
            stops = reads_teacher(self.methods[name] for name in ended) and not reads_teacher(running.values())
            logger.info(
                "Iteration %d: skipping %s from here on, because the schedules of all terms are over%s.",
                iteration, ", ".join(ended), "; the teacher no longer runs" if stops else "",
            )
        return running

    def _distill(
        self, student: Run, teacher: Run | None, running: Mapping[str, DistillMethod]
    ) -> dict[str, torch.Tensor]:
        storage = get_event_storage()
        features = list(student.features.values())
        period = self.gradient_ratio_period
        is_due = period > 0 and (storage.iter + 1) % period == 0
        losses: dict[str, torch.Tensor] = {}
        measured: list[WeightedTerm] = []
        for name, method in self.methods.items():
            require_own_names(name, method.weights, student.losses)
            if name in running:
                terms = self._terms(name, method, student, teacher)
            else:
                terms = {term: torch.zeros((), device=self.device) for term in method.weights}
            for term, value in terms.items():
                weight = method.weight_at(term, storage.iter)
                losses[term] = value * weight
                if method.is_scheduled(term):
                    storage.put_scalar(scalar_name(WEIGHT_SCALARS, term), weight, smoothing_hint=False)
                if is_due and name in running:
                    measured.append(method.weighted_term(term, value, storage.iter))
        if measured:
            report_ratios(list(student.losses.values()), measured, features)
        return losses

    def _terms(self, name: str, method: DistillMethod, student: Run, teacher: Run | None) -> dict[str, torch.Tensor]:
        """Return the terms of a method that have a weight."""
        returned = method(student, teacher)
        require_declared(name, returned, method.declared)
        terms = {term: value for term, value in returned.items() if term in method.weights}
        if self._unchecked_steps:
            require_complete(name, terms, method.weights)
            for term, value in terms.items():
                check_value(name, term, value, list(student.features.values()))
        return terms


def reads_teacher(methods: Iterable[DistillMethod]) -> bool:
    """Return whether one of the methods reads the teacher's run."""
    return any(method.reads_teacher for method in methods)


def wanted_taps(methods: Iterable[DistillMethod]) -> Taps:
    """Return the places in the towers that the methods read, by branch."""
    wanted: dict[str, frozenset] = {}
    for method in methods:
        for branch, positions in method.taps().items():
            wanted[branch] = wanted.get(branch, frozenset()) | positions
    return wanted


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

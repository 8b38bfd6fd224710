"""The meta-architecture that trains a student with the help of a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import nn

from .detectors.building import build_detector
from .errors import UserError
from .methods import DistillMethod
from .methods.automatic import balance_period, build_chosen_methods
from .methods.balance import GradientBalance
from .methods.gradient_ratio import measure_ratios, report_ratios, scalar_name
from .methods.pairing import require_teacher
from .methods.terms import check_value, require_complete, require_declared, require_gradients, require_own_names
from .methods.trust import losses_on_labels, outputs_alike
from .staged import Run, StagedDetector, Taps, stage_detector
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
        balance_period: iterations between two updates of :mod:`~d2_distill.methods.balance`; 0 keeps the weights.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        methods: nn.ModuleDict | None = None,
        input_format: str,
        build_teaching: Callable[[StagedDetector], tuple[Teacher | None, nn.ModuleDict]] | None = None,
        inherited: Sequence[str] = (),
        gradient_ratio_period: int = 0,
        balance_period: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.staged = stage_detector(student)
        self.input_format = input_format
        self._logged_ends: set[str] = set()
        self.inherited = inherited
        self.gradient_ratio_period = gradient_ratio_period
        self.balance_period = balance_period
        self._unchecked_steps = CHECKED_STEPS
        self._last_measured = -1
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
            "balance_period": balance_period(cfg),
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

    def _built(self) -> tuple[Teacher | None, nn.ModuleDict]:
        # The initialisation of teacher and adapters must not shift the random numbers of plain training.
        # Models are made on the CPU; forking GPU generators as well would open every GPU of the machine.
        with torch.random.fork_rng(devices=[]):
            return self._build_teaching(self.staged)

    def _take(self, teacher: Teacher | None, methods: nn.ModuleDict) -> None:
        self.teacher = teacher
        self.balance = None
        if self.balance_period and methods:
            targets = {term: method.ratio(term) for method in methods.values() for term in method.weights}
            self.balance = GradientBalance(targets, self.balance_period)
        self._compares_labels = self.balance is not None and teacher is not None and outputs_alike(
            self.staged, teacher.staged
        )
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
        """Return a dict of losses in training and the student's detections in evaluation, as Detectron2 expects."""
        if not self.training:
            return self.student(batched_inputs)
        if self._build_teaching is not None:
            self._prepare_late(get_event_storage().iter)
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
        iteration = get_event_storage().iter
        values: dict[str, torch.Tensor] = {}
        for name, method in self.methods.items():
            require_own_names(name, method.weights, student.losses)
            if name in running:
                values.update(self._terms(name, method, student, teacher))
            else:
                values.update({term: torch.zeros((), device=self.device) for term in method.weights})
        self._measure(student, teacher, running, values)
        losses: dict[str, torch.Tensor] = {}
        for method in self.methods.values():
            for term in method.weights:
                weight = method.weight_at(term, iteration)
                if self.balance is not None:
                    weight *= self.balance.factor(term)
                losses[term] = values[term] * weight
                if self.balance is not None or method.is_scheduled(term):
                    get_event_storage().put_scalar(scalar_name(WEIGHT_SCALARS, term), weight, smoothing_hint=False)
        return losses

    def _measure(
        self, student: Run, teacher: Run | None, running: Mapping[str, DistillMethod], values: Mapping[str, torch.Tensor]
    ) -> None:
        """Where one of them is due, report gradient ratios and balance the weights by them."""
        iteration, period, balance = get_event_storage().iter, self.gradient_ratio_period, self.balance
        reports = period > 0 and (iteration + 1) % period == 0
        balances = balance is not None and balance.is_due(iteration)
        # A step may come in several parts, of which the first one is measured.
        if not running or not (reports or balances) or iteration == self._last_measured:
            return
        self._last_measured = iteration
        terms = [
            method.weighted_term(term, values[term], iteration, is_balanced=balance is not None)
            for method in running.values()
            for term in method.weights
        ]
        features = list(student.features.values())
        if balances:
            require_gradients(features)
        ratios = measure_ratios(list(student.losses.values()), terms, features)
        if balances:
            balance.update(ratios)
            if self._compares_labels and reads_teacher(running.values()):
                balance.compare(**losses_on_labels(student, teacher))
        if balance is not None:
            ratios = {term: ratio * balance.factor(term) for term, ratio in ratios.items()}
            get_event_storage().put_scalar("distill_say", balance.say, smoothing_hint=False)
        if reports:
            report_ratios(ratios, terms)

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


def _teaching_of(cfg: CfgNode, student: StagedDetector) -> tuple[Teacher | None, nn.ModuleDict]:
    """Build what a config teaches the student with."""
    teacher = Teacher.from_config(cfg)
    return teacher, build_chosen_methods(cfg, student, teacher)


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

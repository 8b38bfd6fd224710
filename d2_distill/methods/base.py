"""What a distillation method is, and how the config selects methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..config.run_length import count_iterations
from ..errors import PairError, UserError
from ..losses.reduction import Batch
from ..staged import Run, StagedDetector, Taps
from ..teacher import Teacher
from .gradient_ratio import WeightedTerm
from .pairing import require_teacher
from .schedules import Schedule, build_schedule, is_constant, is_over
from .terms import require_distinct_terms

DISTILL_METHOD_REGISTRY = Registry("DISTILL_METHOD")
DISTILL_METHOD_REGISTRY.__doc__ = """
Distillation methods, by the name that ``MODEL.DISTILL.METHODS`` uses. Each is a :class:`DistillMethod`.
"""


class DistillMethod(nn.Module):
    """A group of loss terms between a run of the student and a run of the teacher.

    It is a module because it may own adapters, which are trained with the student and saved along with it.

    Attributes:
        KEY: config node of the method, such as "MODEL.DISTILL.PKD".
        WEIGHT_KEYS: term -> key of its weight, below ``KEY``.
        SCHEDULE_KEYS: term -> key of its schedule, below ``KEY``; "SCHEDULE" for all terms that are left out.
        RATIOS: term -> gradient ratio that ``MODEL.DISTILL.BALANCE "auto"`` keeps; 1 for terms that are left out.
        reads_teacher: whether ``forward`` reads the teacher's run. If not, the run may be None, and so may the teacher.
        declared: all terms that ``forward`` may return.
        batch: the images that normalizers and statistics are to be taken over.
        weights: those of them whose weight is not 0, and their weights.

    Args:
        weights: term -> weight, for every term. Terms of weight 0 need not be computed, and are ignored if they are.
        schedule: factor on the weights by iteration, see :mod:`d2_distill.methods.schedules`; one for all terms, or
            term -> its own.
        normalizes_per_process: take normalizers and statistics over the images of a process, as published code does,
            not over those of all.
    """

    KEY: str = ""
    WEIGHT_KEYS: Mapping[str, str] = {}
    SCHEDULE_KEYS: Mapping[str, str] = {}
    RATIOS: Mapping[str, float] = {}
    reads_teacher = True

    def __init__(
        self,
        *,
        weights: dict[str, float],
        schedule: Schedule | Mapping[str, Schedule],
        normalizes_per_process: bool = False,
    ) -> None:
        super().__init__()
        self.batch = Batch(is_shared=not normalizes_per_process)
        self.declared = tuple(weights)
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.schedules = schedule if isinstance(schedule, Mapping) else dict.fromkeys(self.weights, schedule)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> dict[str, Any]:
        """Return the constructor's arguments; a subclass adds its own to these.

        Raises:
            PairError: the method cannot serve this pair of detectors; here, it reads a teacher and there is none.
            UserError: a key of the method has a wrong value.
        """
        if cls.reads_teacher:
            require_teacher(teacher, cls.__name__)
        return cls.common_arguments(cfg)

    @classmethod
    def common_arguments(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the arguments that every method takes, as the config has them."""
        for term, key in cls.WEIGHT_KEYS.items():
            weight = _value(cfg, f"{cls.KEY}.{key}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"{cls.KEY}.{key} is {weight}; the weight of {term} must be 0 or above, and finite.")
        return {
            "normalizes_per_process": cfg.MODEL.DISTILL.NORMALIZE_PER_PROCESS,
            "weights": {term: _value(cfg, f"{cls.KEY}.{key}") for term, key in cls.WEIGHT_KEYS.items()},
            "schedule": {term: cls._schedule(cfg, term) for term in cls.WEIGHT_KEYS},
        }

    @classmethod
    def _schedule(cls, cfg: CfgNode, term: str) -> Schedule:
        key = f"{cls.KEY}.{cls.SCHEDULE_KEYS.get(term, 'SCHEDULE')}"
        return build_schedule(_value(cfg, key), key, run_length=count_iterations(cfg))

    def describe(self) -> str:
        """Return, for the log, what the method compares in this pair."""
        return ", ".join(self.weights)

    def taps(self) -> Taps:
        """Return the places in the towers that the method reads from the ``taps`` of both runs, by branch."""
        return {}

    def forward(self, student: Run, teacher: Run | None) -> dict[str, torch.Tensor]:
        """Return every term of ``self.weights``, a scalar each, before its weight. Other declared terms are ignored."""
        raise NotImplementedError

    def weight_at(self, term: str, iteration: int) -> float:
        """Return the weight of a term at the trainer's iteration."""
        return self.weights[term] * self.schedules[term](iteration)

    def has_ended(self, iteration: int) -> bool:
        """Return whether the method has no effect from this iteration on: its schedules are over, nothing is trained.

        Trained adapters need a gradient in every step, if only of zeros: several processes wait for it.
        """
        over = all(is_over(self.schedules[term], iteration) for term in self.weights)
        return over and not any(parameter.requires_grad for parameter in self.parameters())

    def is_scheduled(self, term: str) -> bool:
        """Return whether the weight of a term depends on the iteration."""
        return not is_constant(self.schedules[term])

    def ratio(self, term: str) -> float:
        """Return the gradient ratio of a term that ``MODEL.DISTILL.BALANCE "auto"`` keeps."""
        return self.RATIOS.get(term, 1.0)

    def weighted_term(
        self, term: str, value: torch.Tensor, iteration: int, is_balanced: bool = False
    ) -> WeightedTerm:
        """Return a term of ``forward`` as :func:`~d2_distill.methods.gradient_ratio.measure_ratios` expects it."""
        key = f"{self.KEY}.{self.WEIGHT_KEYS[term]}" if term in self.WEIGHT_KEYS else ""
        return WeightedTerm(term, value * self.weights[term], self.schedules[term](iteration), key, is_balanced)


def _value(cfg: CfgNode, key: str) -> Any:
    return reduce(getitem, key.split("."), cfg)


def list_methods() -> list[str]:
    """Names that ``MODEL.DISTILL.METHODS`` may contain."""
    return sorted(name for name, _ in DISTILL_METHOD_REGISTRY)


def build_methods(cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> nn.ModuleDict:
    """The methods of ``MODEL.DISTILL.METHODS``, by name, without those whose weights are all 0.

    Raises:
        UserError: a name is unknown or given twice, a method's key has a wrong value, or two methods have a term of
            the same name.
        PairError: a method cannot serve this pair of detectors; it names those that can.
    """
    names = list(cfg.MODEL.DISTILL.METHODS)
    methods = nn.ModuleDict()
    for name in names:
        if name not in DISTILL_METHOD_REGISTRY:
            raise UserError(
                f"MODEL.DISTILL.METHODS has the unknown {name!r}; choose from {', '.join(list_methods())}."
            )
        if names.count(name) > 1:
            raise UserError(f"MODEL.DISTILL.METHODS has {name!r} twice; name each once and raise its weight.")
        method_class = DISTILL_METHOD_REGISTRY.get(name)
        try:
            arguments = method_class.from_config(cfg, student, teacher)
        except PairError as error:
            raise PairError(f"{error} {_alternatives(cfg, student, teacher)}") from None
        method = method_class(**arguments)
        # The adapters of a method that is switched off would be parameters without gradient.
        if method.weights:
            methods[name] = method
    require_distinct_terms({name: method.weights for name, method in methods.items()})
    return methods


def refusals(
    cfg: CfgNode, student: StagedDetector, teacher: Teacher | None
) -> dict[str, UserError | None]:
    """Of every registered method, why it refuses a pair of detectors under a config; None where it does not.

    The methods' own ``from_config`` are asked. Random numbers that they draw are given back.
    """
    found: dict[str, UserError | None] = {}
    with torch.random.fork_rng(devices=[]):
        for name in list_methods():
            try:
                DISTILL_METHOD_REGISTRY.get(name).from_config(cfg, student, teacher)
                found[name] = None
            except UserError as error:
                found[name] = error
            except Exception as error:  # of a method in a user's file, whose keys only its own configs have
                found[name] = UserError(f"{name} fails on this pair: {type(error).__name__}: {error}")
    return found


def _alternatives(cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> str:
    serving = [name for name, refusal in refusals(cfg, student, teacher).items() if refusal is None]
    whom = "this student without a teacher" if teacher is None else "this pair"
    return f"Methods that serve {whom}: {', '.join(serving)}." if serving else f"No method serves {whom}."

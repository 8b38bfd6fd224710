"""Weights of distillation terms as functions of the training iteration.

A schedule is a config list of factors, each ``[name, number, ...]``; their product multiplies a term's
weight. ``[["Warmup", 2000], ["EarlyStop", 58640]]`` rises from 0 to 1 in 2000 iterations and is 0 after
iteration 58640. A decimal up to 1.0 is a part of the run, so ``["Warmup", 0.02]`` lasts 2 % of it, whatever its length;
other numbers count iterations. Iterations are the trainer's, counted from 0, and nothing else counts, so a resumed run
continues exactly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

from ..errors import UserError

# Factor on a weight at an iteration. Other functions than those of build_schedule are never over.
Schedule = Callable[[int], float]


def warmup(iteration: int, length: int) -> float:
    """Return a line from 0 at iteration 0 to 1 at ``length``, then 1."""
    return min(max(iteration / length, 0.0), 1.0) if length else float(iteration >= 0)


def early_stop(iteration: int, last: int) -> float:
    """Return 1 up to and including iteration ``last``, then 0."""
    return float(iteration <= last)


def decay(iteration: int, length: int) -> float:
    """Return a line from 1 at iteration 0 to 0 at ``length``, then 0."""
    return 1 - warmup(iteration, length)


def linear(iteration: int, start_value: float, end_value: float, start: int, end: int) -> float:
    """Return ``start_value`` before iteration ``start``, ``end_value`` from ``end`` on, and a line between."""
    return start_value + (end_value - start_value) * warmup(iteration - start, end - start)


def constant(iteration: int, value: float) -> float:
    """Return ``value`` at every iteration."""
    return value


FACTORS: dict[str, Callable[..., float]] = {
    "Warmup": warmup,
    "EarlyStop": early_stop,
    "Decay": decay,
    "Linear": linear,
    "Constant": constant,
}


# Parameters of the factors that are iterations, in the order in which they must be.
_ITERATIONS = ("start", "end", "length", "last")


@dataclass(frozen=True)
class _Factor:
    """An entry of ``FACTORS`` and its numbers, by the names of its parameters."""

    name: str
    numbers: dict[str, float]

    @property
    def iterations(self) -> list[float]:
        return [self.numbers[name] for name in _ITERATIONS if name in self.numbers]

    def __call__(self, iteration: int) -> float:
        return FACTORS[self.name](iteration, **self.numbers)

    def is_over(self, iteration: int) -> bool:
        """Return whether it is 0 from this iteration on: after the last of its own iterations nothing changes."""
        return iteration >= max(self.iterations, default=0) and self(iteration) == 0


@dataclass(frozen=True)
class _Product:
    """The schedule of a config."""

    factors: tuple[_Factor, ...]

    def __call__(self, iteration: int) -> float:
        return math.prod(factor(iteration) for factor in self.factors)


def build_schedule(
    spec: Sequence[Sequence[Any]], key: str = "schedule", *, run_length: int | None = None
) -> Schedule:
    """Return the factor by which a term's weight is multiplied at an iteration; always 1 for an empty ``spec``.

    Args:
        spec: factors as in the module's docstring.
        key: config key that ``spec`` was read from, for error messages.
        run_length: iterations of the run, of which decimals are parts.

    Raises:
        UserError: an entry is not a known name followed by that factor's numbers.
    """
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise UserError(f"{key} is {spec!r}; it must be a list of factors such as [['Warmup', 2000]].")
    return _Product(tuple(_factor(entry, f"{key}[{index}]", run_length) for index, entry in enumerate(spec)))


def is_constant(schedule: Schedule) -> bool:
    """Return whether a schedule was built from an empty ``spec`` and so is always 1."""
    return isinstance(schedule, _Product) and not schedule.factors


def is_over(schedule: Schedule, iteration: int) -> bool:
    """Return whether a schedule is 0 from this iteration on, because one of its factors is."""
    return isinstance(schedule, _Product) and any(factor.is_over(iteration) for factor in schedule.factors)


def last_iteration(schedule: Schedule) -> float:
    """Return the last iteration at which a schedule from a config changes, 0 for one that never does."""
    if not isinstance(schedule, _Product):
        return 0
    return max((iteration for factor in schedule.factors for iteration in factor.iterations), default=0)


def _factor(entry: Any, where: str, run_length: int | None) -> _Factor:
    if isinstance(entry, str) or not isinstance(entry, Sequence) or not entry:
        raise UserError(f"{where} is {entry!r}; it must be a factor such as ['Warmup', 2000].")
    name, values = entry[0], tuple(entry[1:])
    if not isinstance(name, str) or name not in FACTORS:
        raise UserError(f"{where} is {entry!r}; the factors are {', '.join(FACTORS)}.")
    parameters = list(inspect.signature(FACTORS[name]).parameters)[1:]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(values) != len(parameters) or not numbers:
        raise UserError(f"{where} is {entry!r}; {name} takes the numbers {', '.join(parameters)}.")
    given = dict(zip(parameters, values))
    factor = _Factor(name, {
        parameter: _iteration(number, entry, where, run_length) if parameter in _ITERATIONS else number
        for parameter, number in given.items()
    })
    if factor.iterations != sorted(factor.iterations) or min(factor.iterations, default=0) < 0:
        raise UserError(f"{where} is {entry!r}; its iterations must be 0 or more and in ascending order.")
    return factor


def _iteration(number: float, entry: Any, where: str, run_length: int | None) -> float:
    if isinstance(number, int) or not 0 < number <= 1:
        return number
    if run_length is None:
        raise UserError(f"{where} is {entry!r}, a part of a run whose length is not known; write whole iterations.")
    return number * run_length

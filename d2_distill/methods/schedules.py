"""Weights of distillation terms as functions of the training iteration.

A schedule is a config list of factors, each ``[name, number, ...]``; their product multiplies a term's
weight. ``[["Warmup", 2000], ["EarlyStop", 58640]]`` rises from 0 to 1 in 2000 iterations and is 0 after
iteration 58640. Iterations are the trainer's, counted from 0, so that a resumed run continues exactly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

from ..errors import UserError


def warmup(iteration: int, length: int) -> float:
    """Linear from 0 at iteration 0 to 1 at ``length``, then 1."""
    return min(max(iteration / length, 0.0), 1.0) if length else 1.0


def early_stop(iteration: int, last: int) -> float:
    """1 up to and including iteration ``last``, then 0."""
    return float(iteration <= last)


def decay(iteration: int, length: int) -> float:
    """Linear from 1 at iteration 0 to 0 at ``length``, then 0."""
    return 1 - warmup(iteration, length)


def linear(iteration: int, start_value: float, end_value: float, start: int, end: int) -> float:
    """``start_value`` up to iteration ``start``, ``end_value`` from ``end`` on, linear between."""
    return start_value + (end_value - start_value) * warmup(iteration - start, end - start)


def constant(iteration: int, value: float) -> float:
    """``value`` at every iteration."""
    return value


FACTORS: dict[str, Callable[..., float]] = {
    "Warmup": warmup,
    "EarlyStop": early_stop,
    "Decay": decay,
    "Linear": linear,
    "Constant": constant,
}


def build_schedule(spec: Sequence[Sequence[Any]], key: str = "schedule") -> Callable[[int], float]:
    """The factor by which a term's weight is multiplied at an iteration; always 1 for an empty ``spec``.

    Args:
        spec: factors as in the module's docstring.
        key: config key that ``spec`` was read from, for error messages.

    Raises:
        UserError: an entry is not a known name followed by that factor's numbers.
    """
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise UserError(f"{key} is {spec!r}; it must be a list of factors such as [['Warmup', 2000]].")
    return partial(_product, tuple(_factor(entry, f"{key}[{index}]") for index, entry in enumerate(spec)))


def is_constant(schedule: Callable[[int], float]) -> bool:
    """Whether a schedule was built from an empty ``spec`` and so is always 1."""
    return isinstance(schedule, partial) and schedule.func is _product and schedule.args == ((),)


def _product(factors: Sequence[Callable[[int], float]], iteration: int) -> float:
    return math.prod(factor(iteration) for factor in factors)


def _factor(entry: Any, where: str) -> Callable[[int], float]:
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
    iterations = [given[name] for name in ("start", "end", "length", "last") if name in given]
    if iterations != sorted(iterations) or min(iterations, default=0) < 0:
        raise UserError(f"{where} is {entry!r}; its iterations must be 0 or more and in ascending order.")
    return partial(FACTORS[name], **given)

"""Weights that follow the gradients, so that they hold for any data, detector and schedule.

``MODEL.DISTILL.BALANCE "auto"``: each distillation term keeps a given ratio of its gradient norm at the student's
features to that of the student's own losses. In the manner of RT-DETRv4's adaptive modulation (arXiv 2510.25257),
whose public code keeps a share p of the norm within bounds: outside, the weight is multiplied by p* (1 - p) / (p (1 - p*))
for the nearer bound p*. With p = r / (1 + r) that is r* / r, which is what :func:`modulation` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The ratio may lie within target / TOLERANCE and target * TOLERANCE.
TOLERANCE = 1.25
# No weight changes by more at a time, as in RT-DETRv4.
LARGEST_CHANGE = 10.0
# Part of the old value in the running means of ratios (geometric) and losses.
MOMENTUM = 0.8
# Factor on the teacher's say at each measurement in which its loss on the labels is not below the student's.
DISTRUST = 0.8


def modulation(ratio: float, target: float) -> float:
    """Return the factor on a weight that brings a ratio to the nearer bound of its target, 1 within the bounds."""
    nearest = min(max(ratio, target / TOLERANCE), target * TOLERANCE)
    return min(max(nearest / ratio, 1 / LARGEST_CHANGE), LARGEST_CHANGE)


class GradientBalance:
    """Factors on the configured weights of terms, updated from measured gradient ratios.

    It measures at iterations 0, 1, 2, 4, 8 and so on up to ``period``, then every ``period`` iterations: early in the
    training ratios change fast. Its state is part of the checkpoints, so a resumed run continues exactly.

    Args:
        targets: term -> ratio to keep.
        period: iterations between two measurements.
    """

    def __init__(self, targets: Mapping[str, float], period: int) -> None:
        self.targets = dict(targets)
        self.period = period
        self._factors = dict.fromkeys(self.targets, 1.0)
        self._logarithms: dict[str, float] = {}  # running mean of each term's ratio at its configured weight
        self._losses: dict[str, float] = {}  # running means of the losses of teacher and student
        self._say = 1.0

    def is_due(self, iteration: int) -> bool:
        """Return whether to measure at the trainer's iteration."""
        if iteration < self.period:
            return iteration & (iteration - 1) == 0
        return iteration % self.period == 0

    def factor(self, term: str) -> float:
        """Return the factor on the configured weight of a term, 1 for a term without a target."""
        return self._factors.get(term, 1.0) * (self._say if term in self._factors else 1.0)

    def update(self, ratios: Mapping[str, float]) -> None:
        """Set the factors.

        Args:
            ratios: term -> gradient ratio at its configured weight. Terms whose ratio is 0 keep their factor.
        """
        for term, target in self.targets.items():
            if ratios.get(term, 0.0) > 0:
                mean = self._logarithms[term] = _blend(self._logarithms.get(term), math.log(ratios[term]))
                self._factors[term] *= modulation(self._factors[term] * math.exp(mean), target)

    def compare(self, *, teacher: float, student: float) -> None:
        """Let the teacher lose its say while its loss on the labels is no better than the student's, and regain it.

        Args:
            teacher, student: value of the student's own losses for the outputs of each, on the same batch.
        """
        for side, loss in (("teacher", teacher), ("student", student)):
            self._losses[side] = _blend(self._losses.get(side), loss)
        is_better = self._losses["teacher"] < self._losses["student"]
        self._say = min(self._say / DISTRUST, 1.0) if is_better else self._say * DISTRUST

    @property
    def say(self) -> float:
        """The teacher's say, from 0 to 1: a factor on all terms."""
        return self._say

    def state_dict(self) -> dict[str, Any]:
        return {
            "factors": dict(self._factors), "logarithms": dict(self._logarithms),
            "losses": dict(self._losses), "say": self._say,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._factors.update(state["factors"])
        self._logarithms = dict(state["logarithms"])
        self._losses, self._say = dict(state["losses"]), state["say"]


def _blend(mean: float | None, value: float) -> float:
    return value if mean is None else MOMENTUM * mean + (1 - MOMENTUM) * value

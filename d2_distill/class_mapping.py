"""Which of a teacher's classes each class of the student is, by name, and layers that predict only those."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .errors import UserError

KEY = "MODEL.DISTILL.TEACHER.CLASS_ALIASES"


def match_classes(
    student: Sequence[str], teacher: Sequence[str], aliases: Sequence[str] = ()
) -> List[Optional[int]]:
    """For each class of the student the index of the teacher's class of its name; None if there is none.

    An alias goes first, then the same name, then the name that differs in upper and lower case, spaces,
    underscores and hyphens alone, if there is only one of it on both sides.

    Args:
        student, teacher: class names, each without repetitions.
        aliases: entries "student name=teacher name".

    Raises:
        UserError: an alias names no class of either, or two classes of the student would be the same of the teacher.
    """
    named = _parse(aliases, student, teacher)
    indices = {name: index for index, name in enumerate(teacher)}
    ours, theirs = Counter(map(_fold, student)), Counter(map(_fold, teacher))
    only = {_fold(name): name for name in teacher if theirs[_fold(name)] == ours[_fold(name)] == 1}
    found: List[Optional[int]] = []
    for name in student:
        other = name if name in indices else only.get(_fold(name), name)
        found.append(indices.get(named.get(name, other)))
    for index in set(found) - {None}:
        ours = [name for name, other in zip(student, found) if other == index]
        if len(ours) > 1:
            raise UserError(
                f"{KEY}: the student's classes {' and '.join(map(repr, ours))} would both be the teacher's "
                f"{teacher[index]!r}, which cannot tell them apart; leave all but one of them to the labels, or take "
                "another teacher."
            )
    return found


def describe(student: Sequence[str], teacher: Sequence[str], found: Sequence[Optional[int]]) -> str:
    """The match of :func:`match_classes` in a few words, with the names that differ."""
    pairs = [(name, teacher[index]) for name, index in zip(student, found) if index is not None]
    renamed = [f"{ours}={theirs}" for ours, theirs in pairs if ours != theirs]
    suffix = f" ({', '.join(renamed)})" if renamed else ""
    return f"{len(pairs)} of its {len(teacher)} classes, by name{suffix}"


def keep_outputs(layer: nn.Module, rows: Sequence[int]) -> None:
    """Keep these outputs of a convolution or linear layer, in this order."""
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        if values is not None:
            setattr(layer, name, nn.Parameter(values.detach()[list(rows)]))
    for name in ("out_channels", "out_features"):
        if hasattr(layer, name):
            setattr(layer, name, len(rows))


class ClassScores(nn.Module):
    """Linear layer to some of the classes of a softmax, and the background, last, which takes the others in.

    The probabilities of the classes that are kept stay what they were, as those of all others add to the background's.
    Plain slicing would hand them to the classes that are kept: a truck would become a car where there is no truck.
    ``weight`` and ``bias`` are those of a plain layer of these classes, to be inherited.

    Args:
        layer: of all K classes and, last, the background.
        classes: that are kept.
    """

    def __init__(self, layer: nn.Linear, classes: Sequence[int]) -> None:
        super().__init__()
        background = layer.out_features - 1
        kept = [*classes, background]
        others = [index for index in range(background) if index not in set(classes)]
        self.weight, self.bias, self.other_weight, self.other_bias = (
            nn.Parameter(values.detach()[rows]) for rows in (kept, others) for values in (layer.weight, layer.bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (R, D) to logits (R, kept classes + 1)."""
        logits = F.linear(x, self.weight, self.bias)
        others = F.linear(x, self.other_weight, self.other_bias)
        background = torch.cat([logits[:, -1:], others], dim=1).logsumexp(dim=1, keepdim=True)
        return torch.cat([logits[:, :-1], background], dim=1)


def _parse(aliases: Sequence[str], student: Sequence[str], teacher: Sequence[str]) -> Dict[str, str]:
    named = {}
    for entry in aliases:
        ours, separator, theirs = entry.partition("=")
        if not separator:
            raise UserError(f"{KEY} has {entry!r}; write 'student name=teacher name'.")
        for side, name, names in (("student", ours, student), ("teacher", theirs, teacher)):
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3)
                known = f"did you mean {' or '.join(close)}?" if close else f"it knows {listed(names)}."
                raise UserError(f"{KEY} has {entry!r}, but the {side} has no class {name!r}; {known}")
        named[ours] = theirs
    return named


def _fold(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first of many names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")

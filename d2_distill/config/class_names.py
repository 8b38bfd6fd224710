"""Match the student's classes with the teacher's by name."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from ..errors import UserError

ALIASES_KEY = "MODEL.DISTILL.TEACHER.CLASS_ALIASES"


def match_classes(
    student: Sequence[str], teacher: Sequence[str], aliases: Sequence[str] = ()
) -> list[int | None]:
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
    found: list[int | None] = []
    for name in student:
        other = name if name in indices else only.get(_fold(name), name)
        found.append(indices.get(named.get(name, other)))
    for index in set(found) - {None}:
        ours = [name for name, other in zip(student, found) if other == index]
        if len(ours) > 1:
            raise UserError(
                f"{ALIASES_KEY}: the student's classes {' and '.join(map(repr, ours))} would both be the teacher's "
                f"{teacher[index]!r}, which cannot tell them apart; leave all but one of them to the labels, or take "
                "another teacher."
            )
    return found


def describe_match(student: Sequence[str], teacher: Sequence[str], found: Sequence[int | None]) -> str:
    """The match of :func:`match_classes` in a few words, with the names that differ."""
    pairs = [(name, teacher[index]) for name, index in zip(student, found) if index is not None]
    renamed = [f"{ours}={theirs}" for ours, theirs in pairs if ours != theirs]
    suffix = f" ({', '.join(renamed)})" if renamed else ""
    return f"{len(pairs)} of its {len(teacher)} classes, by name{suffix}"


def _parse(aliases: Sequence[str], student: Sequence[str], teacher: Sequence[str]) -> dict[str, str]:
    named = {}
    for entry in aliases:
        ours, separator, theirs = entry.partition("=")
        if not separator:
            raise UserError(f"{ALIASES_KEY} has {entry!r}; write 'student name=teacher name'.")
        for side, name, names in (("student", ours, student), ("teacher", theirs, teacher)):
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3)
                known = f"did you mean {' or '.join(close)}?" if close else f"it knows {listed(names)}."
                raise UserError(f"{ALIASES_KEY} has {entry!r}, but the {side} has no class {name!r}; {known}")
        named[ours] = theirs
    return named


def _fold(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first of many names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")

"""What error messages say of tensors that fit nowhere: how many, the first of them, and what would make them fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

SHOWN = 5


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def prefix_that_differs(ours: Collection[str], theirs: Collection[str]) -> str:
    """Return a sentence about a prefix that a file's names have and a model's lack, or the other way round; else "".

    Args:
        ours: the model's names.
        theirs: the file's.
    """
    for longer, shorter, sentence in (
        (theirs, ours, "Its names begin with {!r}, which the model's lack: save it without."),
        (ours, theirs, "Its names lack the {!r} that the model's begin with: save it with it."),
    ):
        known, prefixes = set(shorter), {}
        for name in longer:
            parts = name.split(".")
            for cut in range(1, len(parts)):
                if ".".join(parts[cut:]) in known:
                    prefix = ".".join(parts[:cut]) + "."
                    prefixes[prefix] = prefixes.get(prefix, 0) + 1
        if prefixes:
            prefix, count = max(prefixes.items(), key=lambda item: item[1])
            if count > min(len(ours), len(theirs)) / 2:
                return " " + sentence.format(prefix)
    return ""


def looks_like_openmmlab(names: Collection[str]) -> bool:
    """Return whether tensors have the names of an OpenMMLab detector."""
    return any(name.startswith("bbox_head.") for name in names) and any(name.startswith("neck.") for name in names)

"""Runs of one model with several seeds: which belong together, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...engine.output_dir import flatten
from ...errors import UserError
from .runs import Run

# Keys that do not make another model of a run.
_FREE_KEYS = (
    "DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "MODEL.DISTILL.GRADIENT_RATIO_PERIOD", "OUTPUT_DIR", "SEED",
    "SOLVER.CHECKPOINTS_KEPT", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "TEST.SAVE_BEST",
)
_SEED_SUFFIX = re.compile(r"[ ._-]*seed[ ._-]*\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """A row of the comparison: the runs of one model, which differ in their seed."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run whose detector stands for all."""
        return next((run for run in self.runs if run.checkpoint), self.runs[0])

    @property
    def title(self) -> str:
        """The name, marked where a run is not finished."""
        return self.name + ("" if all(run.finished for run in self.runs) else " *")


def group_runs(runs: Sequence[tuple[str, Run]]) -> list[Group]:
    """Put runs together that have the same name or, without a name (""), equal configs but for the seed.

    A group without a name is called as its folder, without ``seed1`` and the like, and with as many folders above it as
    it takes to tell it from the others.

    Raises:
        UserError: a folder is given twice.
    """
    members: dict[tuple[str, str], list[Run]] = {}
    folders = set()
    for name, run in runs:
        folder = run.folder.resolve()
        if folder in folders:
            raise UserError(f"{run.folder} is given twice; name each run once.")
        folders.add(folder)
        members.setdefault((name, "" if name else _signature(run)), []).append(run)
    unnamed = [group[0].folder for (name, _), group in members.items() if not name]
    names = iter(_short_names(unnamed, taken=[name for name, _ in members if name]))
    return [Group(name or next(names), group) for (name, _), group in members.items()]


def notes(groups: Sequence[Group], test_set: str) -> list[str]:
    """What a reader has to know of the runs: a sentence each."""
    found = []
    for group in groups:
        keys = _differing_keys(group.runs)
        if keys:
            found.append(
                f"The runs of {group.name} differ not in their seed alone but in {', '.join(keys)}; parameters, "
                f"GFLOPs, images/s and pictures are those of {group.first.folder}."
            )
        seeds = [run.cfg.SEED for run in group.runs if run.cfg.SEED >= 0]
        if len(set(seeds)) < len(seeds):
            found.append(f"Runs of {group.name} have the same SEED, so their spread says little.")
        for run in group.runs:
            if not run.finished:
                found.append(f"{run.folder} ({group.name}) is not finished: {run.iterations} iterations.")
            evaluated = max(run.metric_curves(test_set).get("AP", {-1: 0.0})) + 1
            if evaluated < run.iterations:
                when = f"last evaluated after {evaluated}" if evaluated else "not evaluated yet, after"
                found.append(f"{run.folder} ({group.name}) was {when} of {run.iterations} iterations.")
    return found


def _leaves(run: Run) -> dict[str, str]:
    leaves = flatten(yaml.safe_load(run.cfg.dump()))
    return {key: repr(value) for key, value in leaves.items() if key not in _FREE_KEYS}


def _signature(run: Run) -> str:
    return repr(sorted(_leaves(run).items()))


def _differing_keys(runs: Sequence[Run]) -> list[str]:
    first, *others = map(_leaves, runs)
    return sorted({key for other in others for key in first if other.get(key) != first[key]})


def _short_names(folders: Sequence[Path], taken: Sequence[str]) -> list[str]:
    """The end of each path, as short as it can be."""
    parts = [[part for part in map(_without_seed, folder.absolute().parts) if part] for folder in folders]
    longest = max(map(len, parts), default=1)
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths)]
        clashing = [
            index for index, name in enumerate(names) if (names + list(taken)).count(name) > 1
        ]
        if not clashing or max(lengths) >= longest:
            break
        for index in clashing:
            lengths[index] += 1
    # Of seed1 and seed2 with different configs nothing but the whole path is left.
    return [str(folders[index]) if index in clashing else name for index, name in enumerate(names)]


def _without_seed(part: str) -> str:
    return _SEED_SUFFIX.sub("", part)

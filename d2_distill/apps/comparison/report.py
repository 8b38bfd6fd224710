"""Puts a comparison together and writes its files, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...data.checks import check_dataset
from ...data.registration import register_datasets
from ...data.subset import evenly_spread
from ...errors import UserError
from ...evaluation.matching import IOU
from . import plots, tables
from .groups import Group, notes
from .measures import SPEED_IMAGES, SPEED_ROUNDS, Detector, Measures, Record, images_per_second, measure_size
from .pictures import draw_comparison, most_different
from .runs import common_test_set

PAGE, NUMBERS = "comparison.md", "comparison.csv"
PICTURES = {
    "ap.png": "AP by iteration; bands are one standard deviation over seeds",
    "losses.png": "Losses by iteration, and the weights of terms with a schedule",
    "cost.png": "AP against cost; bars are one standard deviation over seeds",
    "classes.png": "AP of each class; lines are one standard deviation over seeds",
    "detections.png": "Detections",
}
ROWS_ON_SCREEN = 20


@dataclass(frozen=True)
class Options:
    """What is to be compared, and how.

    Attributes:
        baseline: name of the group that the others are compared with; "" for none.
        test_set: "" takes the first of the first run.
        speed: whether to measure images/s.
        images: how many test images to draw.
        pick: "spread" evenly over the test set, or those on which the models "differ" most.
    """

    baseline: str = ""
    test_set: str = ""
    speed: bool = True
    images: int = 6
    score_threshold: float = 0.3
    pick: str = "spread"


@dataclass
class Comparison:
    """All that is shown.

    Attributes:
        records: the test set, empty where its files are not here.
        notes: sentences on what is missing, and on what to mind.
    """

    groups: list[Group]
    test_set: str
    options: Options
    records: list[Record] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    detectors: dict[str, Detector] = field(default_factory=dict)
    measured: dict[str, Measures] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sections(self) -> list[tables.Table]:
        """The tables: all groups, their differences to the baseline if there is one, and the classes."""
        found = [tables.main_table(self.groups, self.measured, self.test_set)]
        if self.options.baseline:
            found.append(tables.difference_table(self.groups, self.baseline, self.test_set))
        by_class = tables.class_table(self.groups, self.test_set, self.class_names)
        return found + ([by_class] if by_class else [])

    @property
    def baseline(self) -> Group:
        return next(group for group in self.groups if group.name == self.options.baseline)


def compare_runs(groups: list[Group], options: Options, *, progress: Callable[[str], None]) -> Comparison:
    """Load the detectors and measure them; what needs files that are not here is left out, with a note.

    Raises:
        UserError: the runs cannot be compared, there is no such baseline, or a checkpoint does not fit its config.
    """
    names = [group.name for group in groups]
    if options.baseline and options.baseline not in names:
        raise UserError(f"--baseline {options.baseline} is none of the compared models, {', '.join(names)}.")
    test_set = common_test_set([run for group in groups for run in group.runs], options.test_set)
    comparison = Comparison(groups, test_set, options, notes=notes(groups, test_set))
    try:
        _load_data(comparison)
    except UserError as error:
        comparison.notes.append(f"Left out, for want of the test images: GFLOPs, images/s and detections. {error}")
    for group in groups:
        progress(f"{group.name}: loading {group.first.checkpoint}")
        if group.first.checkpoint is None:
            folder = group.first.folder
            comparison.notes.append(f"{folder} ({group.name}) has no checkpoint yet: only its scalars are shown.")
            comparison.measured[group.name] = Measures()
            continue
        detector = comparison.detectors[group.name] = Detector(group.first)
        comparison.measured[group.name] = measure_size(detector, next(iter(comparison.records), None))
    if options.speed and comparison.records and comparison.detectors:
        images = evenly_spread(comparison.records, SPEED_IMAGES)
        for name, speed in images_per_second(comparison.detectors, images, progress=progress).items():
            size = comparison.measured[name]
            comparison.measured[name] = Measures(size.parameters, size.multiply_adds, speed)
    return comparison


def require_folder(output: Path) -> None:
    """
    Raises:
        UserError: ``output`` is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder.")


def write(comparison: Comparison, output: Path, *, progress: Callable[[str], None]) -> list[str]:
    """Write tables, plots and pictures to the folder ``output``; those of an earlier comparison are replaced.

    Returns:
        The names of the files.
    """
    with _whole_files(output, (PAGE, NUMBERS, *PICTURES)) as folder:
        written = [*_write_plots(comparison, folder, progress), *_write_detections(comparison, folder, progress)]
        (folder / PAGE).write_text(_page(comparison, written), encoding="utf-8")
        text = tables.csv_text(comparison.groups, comparison.measured, comparison.test_set)
        (folder / NUMBERS).write_text(text, encoding="utf-8")
    return [PAGE, NUMBERS, *written]


def screen(comparison: Comparison) -> str:
    """The tables as text."""
    parts = [
        table.text() if len(table.rows) <= ROWS_ON_SCREEN else f"({len(table.rows)} classes: see {PAGE})"
        for table in comparison.sections()
    ]
    return "\n\n".join([f"On {comparison.test_set}:", *parts])


def _load_data(comparison: Comparison) -> None:
    """Register the test set alone, so that the training images need not be here."""
    test_set = comparison.test_set
    register_datasets(comparison.groups[0].first.cfg, names=(test_set,))
    check_dataset(test_set, key="DATASETS.TEST", strict=False)
    comparison.records = DatasetCatalog.get(test_set)
    comparison.class_names = list(MetadataCatalog.get(test_set).get("thing_classes", []))


def _write_plots(comparison: Comparison, folder: Path, progress: Callable[[str], None]) -> list[str]:
    progress("plots")
    groups, test_set = comparison.groups, comparison.test_set
    try:
        figures = {
            "ap.png": plots.plot_ap(groups, test_set),
            "losses.png": plots.plot_losses(groups),
            "cost.png": plots.plot_cost(groups, comparison.measured, test_set),
            "classes.png": plots.plot_classes(groups, test_set, comparison.class_names),
        }
    except UserError as error:  # there is no matplotlib
        comparison.notes.append(f"Left out: plots. {error}")
        return []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
    return [name for name, figure in figures.items() if figure is not None]


def _write_detections(comparison: Comparison, folder: Path, progress: Callable[[str], None]) -> list[str]:
    options, detectors, records = comparison.options, comparison.detectors, comparison.records
    if not (options.images and records and detectors):
        return []
    threshold = options.score_threshold
    if options.pick == "differ":
        records = most_different(records, detectors, threshold, options.images, progress=progress)
    else:
        records = evenly_spread(records, options.images)
    picture = draw_comparison(records, detectors, comparison.class_names, threshold, progress=progress)
    picture.save(folder / "detections.png")
    return ["detections.png"]


def _page(comparison: Comparison, pictures: Sequence[str]) -> str:
    """The whole comparison in Markdown."""
    options = comparison.options
    main, *others = comparison.sections()
    parts = [f"# Comparison on {comparison.test_set}", main.markdown(), _legend(comparison)]
    if any(group.title != group.name for group in comparison.groups):
        parts.append("\\* not finished.")
    if options.baseline:
        difference, *others = others
        parts += [
            f"## Differences to {options.baseline}",
            difference.markdown(),
            "Differences of the means, ± their standard error where both models have several seeds.",
        ]
    if others:
        parts += ["## AP of each class", others[0].markdown()]
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in comparison.notes)]
    parts += [f"## {PICTURES[name]}\n\n![{PICTURES[name]}]({name})" for name in pictures]
    if "detections.png" in pictures:
        parts.append(
            f"Detections of the first run of each model that score at least {options.score_threshold:g}. An object is "
            f"found by the surest detection of its class with an IoU of at least {IOU:g}; other detections are wrong."
        )
    rows = [[group.name, str(run.cfg.SEED), str(run.folder)] for group in comparison.groups for run in group.runs]
    parts += ["## Runs", tables.Table(["model", "seed", "folder"], rows).markdown()]
    return "\n\n".join(parts) + "\n"


def _legend(comparison: Comparison) -> str:
    sentences = ["AP and the like are those of the last evaluation"]
    if any(len(group.runs) > 1 for group in comparison.groups):
        sentences[0] += ", mean ± sample standard deviation over seeds"
    sentences.append("GFLOPs: 10^9 multiply-adds of the convolutions and linear layers for the first test image")
    if any(size.images_per_second for size in comparison.measured.values()):
        threads = torch.get_num_threads()
        device = "a GPU" if torch.cuda.is_available() else f"a CPU with {threads} thread{'s' * (threads > 1)}"
        sentences.append(
            f"Images/s: one image a batch with post-processing, without reading it, on {device}, median of "
            f"{SPEED_ROUNDS} in turns with the other models"
        )
    sentences.append("Training time: all steps, without evaluations")
    return ". ".join(sentences) + "."


@contextlib.contextmanager
def _whole_files(output: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder whose files replace those of the same ``names`` in ``output`` when the body is through."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as scratch:
        yield Path(scratch)
        for name in names:
            if (Path(scratch) / name).exists():
                os.replace(Path(scratch) / name, output / name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    (output / name).unlink()

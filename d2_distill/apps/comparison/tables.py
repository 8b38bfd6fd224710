"""The numbers of a comparison as text, Markdown and CSV."""

from __future__ import annotations

import csv
import datetime
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from tabulate import tabulate

from .groups import Group
from .measures import Measures

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_PREFIX = "AP-"
ABSENT = "-"
Measured = Mapping[str, Measures]  # by the name of the group


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; of a single one there is no deviation."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), sample_deviation(values), len(values))

    @property
    def standard_error(self) -> float | None:
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)

    def __str__(self) -> str:
        if self.deviation is None or math.isnan(self.mean):
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


def sample_deviation(values: Sequence[float]) -> float | None:
    """None of fewer than two values. Unlike ``statistics.stdev`` it takes NaN, which gives NaN."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def spreads(group: Group, test_set: str) -> dict[str, Spread]:
    """Every metric that all of the group's runs have, from their last evaluations."""
    found = [run.metrics(test_set) for run in group.runs]
    return {name: Spread.of([each[name] for each in found]) for name in found[0] if all(name in each for each in found)}


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; the first column names the rows."""

    headers: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        return self._format("simple", self.headers, self.rows)

    def markdown(self) -> str:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in (self.headers, *self.rows)]
        return self._format("pipe", escaped[0], escaped[1:])

    @staticmethod
    def _format(style: str, headers: list[str], rows: list[list[str]]) -> str:
        alignment = ["left"] + ["right"] * (len(headers) - 1)
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=alignment)


def main_table(groups: Sequence[Group], measured: Measured, test_set: str) -> Table:
    """A row a group. Columns in which no row has anything are left out."""
    columns: dict[str, list[str]] = {"model": [group.title for group in groups]}
    if any(len(group.runs) > 1 for group in groups):
        columns["seeds"] = [str(len(group.runs)) for group in groups]
    sizes = [measured[group.name] for group in groups]
    columns["parameters"] = [_text(size.parameters, lambda n: f"{n / 1e6:.3g} M") for size in sizes]
    columns["GFLOPs"] = [_text(size.multiply_adds, lambda n: f"{n / 1e9:.3g}") for size in sizes]
    columns["images/s"] = [_text(size.images_per_second, _speed) for size in sizes]
    found = [spreads(group, test_set) for group in groups]
    for metric in METRICS:
        columns[metric] = [_text(each.get(metric), str) for each in found]
    columns["iterations"] = ["{:g}".format(statistics.fmean(run.iterations for run in group.runs)) for group in groups]
    columns["training time"] = [_text(_mean_seconds(group), _clock) for group in groups]
    kept = {header: cells for header, cells in columns.items() if {*cells} - {ABSENT, "nan"} or header == "AP"}
    return Table(list(kept), [list(row) for row in zip(*kept.values())])


def difference_table(groups: Sequence[Group], baseline: Group, test_set: str) -> Table:
    """Each group's mean minus the baseline's, with the standard error of that difference where both have seeds."""
    theirs = spreads(baseline, test_set)
    metrics = [metric for metric in METRICS if not math.isnan(theirs.get(metric, Spread.of([math.nan])).mean)]
    rows = []
    for group in groups:
        if group is not baseline:
            ours = spreads(group, test_set)
            cells = [_difference(ours[name], theirs[name]) if name in ours else ABSENT for name in metrics]
            rows.append([group.title, *cells])
    return Table([f"minus {baseline.name}", *metrics], rows)


def class_table(groups: Sequence[Group], test_set: str, order: Sequence[str] = ()) -> Table | None:
    """A row a class, a column a group; None if no evaluation told classes apart."""
    found = [spreads(group, test_set) for group in groups]
    rows = [
        [name, *(_text(each.get(CLASS_PREFIX + name), str) for each in found)]
        for name in class_names(found, order)
    ]
    return Table(["class", *(group.title for group in groups)], rows) if rows else None


def class_names(found: Sequence[Mapping[str, Any]], order: Sequence[str] = ()) -> list[str]:
    """The classes that any of the metrics tell apart: those of ``order`` first, then by name."""
    names = {name[len(CLASS_PREFIX) :] for each in found for name in each if name.startswith(CLASS_PREFIX)}
    return [name for name in order if name in names] + sorted(names - set(order))


def csv_text(groups: Sequence[Group], measured: Measured, test_set: str) -> str:
    """A line a run, with everything that is known of it in full precision; what is not known is empty."""
    lines: list[dict[str, Any]] = []
    for group in groups:
        size = measured[group.name]
        for run in group.runs:
            metrics = run.metrics(test_set)
            lines.append({
                "model": group.name,
                "folder": run.folder,
                "seed": run.cfg.SEED,
                "finished": run.finished,
                "test_set": test_set,
                "iterations": run.iterations,
                "train_seconds": run.last("train_seconds"),
                "parameters": size.parameters,
                "multiply_adds": size.multiply_adds,
                "images_per_second": size.images_per_second,
                **{name: metrics.get(name) for name in METRICS},
                **{name: metrics[name] for name in sorted(metrics)},
            })
    fields = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _text(value: Any, form: Callable[[Any], str]) -> str:
    return ABSENT if value is None else form(value)


def _difference(ours: Spread, theirs: Spread) -> str:
    text = f"{ours.mean - theirs.mean:+.1f}"
    if ours.standard_error is None or theirs.standard_error is None:
        return text
    return f"{text} ± {math.hypot(ours.standard_error, theirs.standard_error):.1f}"


def _mean_seconds(group: Group) -> float | None:
    seconds = [run.last("train_seconds") for run in group.runs]
    return None if None in seconds else statistics.fmean(seconds)


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:.3g}" if images_per_second < 100 else f"{images_per_second:.0f}"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))

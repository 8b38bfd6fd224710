"""Plots of a comparison: AP and losses by iteration, AP against cost, AP of each class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...distiller import WEIGHT_SCALARS
from ..pictures import new_figure
from .groups import Group
from .measures import Measures
from .runs import Curves
from .tables import CLASS_PREFIX, class_names, sample_deviation, spreads

# Okabe and Ito's colours for eyes of every kind, without those too pale for lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
CLASSES_IN_A_PANEL = 20
FEW = 15  # values, up to which each is marked on its curve


def style(index: int, *, line: bool = False) -> dict[str, str]:
    """Colour and marker of a group; its line too, once the colours repeat."""
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return {"color": color, "marker": marker, "linestyle": LINES[index // len(COLORS) % len(LINES)] if line else "none"}


def plot_ap(groups: Sequence[Group], test_set: str) -> Any | None:
    """AP of every evaluation; None if there was none."""
    curves = [[run.metric_curves(test_set) for run in group.runs] for group in groups]
    figure, panels = new_figure(1, 1, width=7, height=4.4)
    panel = panels[0, 0]
    drawn = [_draw_mean(panel, each, "AP", index) for index, each in enumerate(curves)]
    if not any(drawn):
        return None
    panel.set_ylabel(f"AP on {test_set}")
    panel.set_xlim(left=0)
    return _finish(figure, panels, groups, marked=True)


def plot_losses(groups: Sequence[Group]) -> Any | None:
    """The total loss, every term of it, and the weights of terms with a schedule, one panel each."""
    curves = [[run.curves for run in group.runs] for group in groups]
    known = {name for group in curves for run in group for name in run}
    terms = sorted(name for name in known if "loss" in name and name != "total_loss")
    names = ["total_loss", *terms, *sorted(name for name in known if name.startswith(f"{WEIGHT_SCALARS}/"))]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = new_figure(rows, columns, width=4.4, height=3)
    drawn = False
    end = max((max(curve, default=0) for group in curves for run in group for curve in run.values()), default=0)
    for name, panel in zip(names, panels.flat):
        drawn |= any([_draw_mean(panel, each, name, index) for index, each in enumerate(curves)])
        panel.set_title(name)
        panel.set_xlim(0, max(1, end) * 1.02)
    for panel in list(panels.flat)[len(names) :]:
        panel.set_axis_off()
    return _finish(figure, panels, groups) if drawn else None


def plot_cost(groups: Sequence[Group], measured: Mapping[str, Measures], test_set: str) -> Any | None:
    """AP against GFLOPs and against images/s, as far as they were measured; None if neither was."""
    aps = [spreads(group, test_set).get("AP") for group in groups]
    sizes = [measured[group.name] for group in groups]
    axes = {
        "GFLOPs": [None if size.multiply_adds is None else size.multiply_adds / 1e9 for size in sizes],
        "images/s": [size.images_per_second for size in sizes],
    }
    axes = {name: values for name, values in axes.items() if any(value is not None for value in values)}
    if not axes or not any(aps):
        return None
    figure, panels = new_figure(1, len(axes), width=4.6, height=4)
    for (name, values), panel in zip(axes.items(), panels.flat):
        for index, (ap, value) in enumerate(zip(aps, values)):
            if ap is not None and value is not None:
                panel.errorbar(value, ap.mean, yerr=ap.deviation, capsize=4, markersize=8, **style(index))
        panel.set_xlabel(name)
        panel.set_ylabel(f"AP on {test_set}")
        panel.margins(0.12)
        panel.set_xlim(0, 1.12 * max(value for value in values if value is not None))
    return _finish(figure, panels, groups, xlabel=None, marked=True)


def plot_classes(groups: Sequence[Group], test_set: str, order: Sequence[str] = ()) -> Any | None:
    """Bars of each class's AP; None if no evaluation told classes apart."""
    found = [spreads(group, test_set) for group in groups]
    names = class_names(found, order)
    if not names:
        return None
    columns = math.ceil(len(names) / CLASSES_IN_A_PANEL)
    in_a_panel = math.ceil(len(names) / columns)
    height = 0.6 + in_a_panel * (0.16 * len(groups) + 0.14)
    figure, panels = new_figure(1, columns, width=max(6.0 / columns, 4.0), height=height)
    thickness = 0.8 / len(groups)
    highest = max((
        value.mean + (value.deviation or 0) for each in found for name, value in each.items()
        if name.startswith(CLASS_PREFIX) and not math.isnan(value.mean)
    ), default=0)
    for number, panel in enumerate(panels.flat):
        shown = names[number * in_a_panel : (number + 1) * in_a_panel]
        for index, each in enumerate(found):
            spread = [each.get(CLASS_PREFIX + name) for name in shown]
            panel.barh(
                [place + (index - (len(groups) - 1) / 2) * thickness for place in range(len(shown))],
                [0 if value is None else value.mean for value in spread],
                xerr=[0 if value is None else value.deviation or 0 for value in spread],
                height=0.9 * thickness, color=style(index)["color"], error_kw={"elinewidth": 1},
            )
        panel.set_yticks(range(len(shown)), shown)
        panel.set_ylim(in_a_panel - 0.5, -0.5)  # from the top down
        panel.set_xlim(0, 1.05 * max(highest, 1))
    return _finish(figure, panels, groups, xlabel=f"AP on {test_set}", bars=True)


def _draw_mean(panel: Any, runs: Sequence[Curves], name: str, index: int) -> bool:
    """Mean over the runs of a group, within a band of one standard deviation; False if there is nothing to draw."""
    iterations, means, deviations = mean_curve([run.get(name, {}) for run in runs])
    if not iterations:
        return False
    drawn = style(index, line=True)
    if len(iterations) > FEW:
        drawn["marker"] = ""
    panel.plot(iterations, means, linewidth=1.6, markersize=5, **drawn)
    if deviations:
        low, high = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
        panel.fill_between(iterations, low, high, color=drawn["color"], alpha=0.2, linewidth=0)
    return True


def mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """Iterations that all curves have, the means there, and of several curves the sample standard deviations."""
    iterations = sorted(set(curves[0]).intersection(*curves[1:]))
    values = [[curve[iteration] for curve in curves] for iteration in iterations]
    deviations = [sample_deviation(each) or 0.0 for each in values] if len(curves) > 1 else []
    return iterations, [statistics.fmean(each) for each in values], deviations


def _finish(
    figure: Any,
    panels: Any,
    groups: Sequence[Group],
    *,
    xlabel: str | None = "iteration",
    marked: bool = False,
    bars: bool = False,
) -> Any:
    """Axes, and one legend above all panels, where it covers none."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for panel in panels.flat:
        if xlabel:
            panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3, axis="x" if bars else "both")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    handles = []
    for index, group in enumerate(groups):
        look = style(index, line=True)
        if bars:
            handles.append(Patch(color=look["color"], label=group.title))
        else:
            handles.append(Line2D([], [], label=group.title, **{**look, "marker": look["marker"] if marked else ""}))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(groups)), frameon=False)
    return figure

"""Curves over seeds, and what is drawn when something was not measured."""

from __future__ import annotations

import pytest

from d2_distill.apps.comparison import plots
from d2_distill.apps.comparison.groups import group_runs
from d2_distill.apps.comparison.measures import Measures
from d2_distill.apps.comparison.runs import read_run

from .small_runs import write_run

pytest.importorskip("matplotlib")


@pytest.fixture
def groups(data, tmp_path):
    folders = [write_run(tmp_path / f"seed{seed}", data=data, seed=seed) for seed in (1, 3)]
    return group_runs([("plain", read_run(folder)) for folder in folders])


def test_mean_curve_where_all_seeds_have_values():
    curves = [{9: 1.0, 19: 2.0, 29: 5.0}, {9: 3.0, 19: 2.0}]
    iterations, means, deviations = plots.mean_curve(curves)
    assert (iterations, means) == ([9, 19], [2.0, 2.0])
    assert deviations == pytest.approx([2**0.5, 0.0])
    assert plots.mean_curve([{4: 1.0}]) == ([4], [1.0], []) and plots.mean_curve([{}, {4: 1.0}]) == ([], [], [])


def test_losses_of_all_terms_with_a_band(groups):
    figure = plots.plot_losses(groups)
    panels = [panel for panel in figure.axes if panel.lines]
    assert [panel.get_title() for panel in panels] == ["total_loss", "loss_box_reg", "loss_cls"]
    [line] = panels[0].lines
    # 3 - iteration / 10 + seed, written as the median so far
    assert line.get_xdata().tolist() == [9, 19] and line.get_ydata()[0] == pytest.approx(3 - 0.9 + 2)
    assert len(panels[0].collections) == 1


def test_cost_of_what_was_measured(groups, data):
    test_set = data["TEST"][0]
    assert plots.plot_cost(groups, {"plain": Measures(5)}, test_set) is None
    [panel] = plots.plot_cost(groups, {"plain": Measures(5, 3 * 10**9)}, test_set).axes
    assert panel.get_xlabel() == "GFLOPs"
    assert len(plots.plot_cost(groups, {"plain": Measures(5, 3 * 10**9, 20.0)}, test_set).axes) == 2


def test_classes_in_panels_of_twenty(data, tmp_path):
    metrics = {"AP": 1.0, **{f"AP-class {number}": float(number) for number in range(41)}}
    groups = group_runs([("", read_run(write_run(tmp_path / "run", data=data, metrics=metrics)))])
    test_set = data["TEST"][0]
    assert [len(panel.patches) for panel in plots.plot_classes(groups, test_set).axes] == [14, 14, 13]


def test_runs_without_an_evaluation(data, tmp_path):
    folder = write_run(tmp_path / "run", data=data, checkpoint="")
    (folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0}\n')
    groups, test_set = group_runs([("", read_run(folder, unfinished=True))]), data["TEST"][0]
    assert plots.plot_ap(groups, test_set) is None and plots.plot_classes(groups, test_set) is None
    assert plots.plot_cost(groups, {"run": Measures(5, 3, 20.0)}, test_set) is None
    assert len(plots.plot_losses(groups).axes) == 1


def test_groups_look_different():
    looks = [tuple(plots.style(index, line=True).values()) for index in range(14)]
    assert len(set(looks)) == 14

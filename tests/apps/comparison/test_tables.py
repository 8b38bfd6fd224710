"""Means, spreads, differences, and the forms that a table takes."""

from __future__ import annotations

import csv
import io
import math
import statistics

import pytest

from d2_distill.apps.comparison import tables
from d2_distill.apps.comparison.groups import group_runs
from d2_distill.apps.comparison.measures import Measures
from d2_distill.apps.comparison.runs import read_run
from d2_distill.apps.comparison.tables import Spread

from .small_runs import METRICS, write_run


@pytest.fixture
def groups(data, tmp_path):
    """Two seeds of a plain student, and a teacher with a seed."""
    for seed, ap in ((1, 20.0), (2, 23.0)):
        write_run(tmp_path / f"plain_seed{seed}", data=data, seed=seed, metrics={**METRICS, "AP": ap})
    write_run(tmp_path / "teacher", data=data, RETINANET__NUM_CONVS=4, metrics={**METRICS, "AP": 31.0})
    return group_runs([("", read_run(tmp_path / name)) for name in ("teacher", "plain_seed1", "plain_seed2")])


@pytest.fixture
def test_set(data):
    return data["TEST"][0]


MEASURED = {"teacher": Measures(3_119_064, 130_659_840, 43.0012), "plain": Measures(1_007_944, None, 164.2)}


def test_spread():
    values = [35.8, 34.6, 31.9]
    spread = Spread.of(values)
    assert str(spread) == "34.1 ± 2.0"
    assert spread.deviation == pytest.approx(statistics.stdev(values))
    assert spread.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert str(Spread.of([1.04])) == "1.0" and Spread.of([1.0]).standard_error is None
    assert str(Spread.of([math.nan, 1.0])) == "nan"


def test_main_table(groups, test_set):
    table = tables.main_table(groups, MEASURED, test_set)
    rows = [dict(zip(table.headers, row)) for row in table.rows]
    assert list(rows[0]) == [
        "model", "seeds", "parameters", "GFLOPs", "images/s", "AP", "AP50", "APs", "iterations", "training time"
    ]  # AP75 is undefined, and nothing is medium or large
    assert list(rows[0].values()) == [
        "teacher", "1", "3.12 M", "0.131", "43", "31.0", "40.0", "10.0", "20", "0:16:45"
    ]
    assert rows[1] == {
        **rows[0], "model": "plain", "seeds": "2", "parameters": "1.01 M", "GFLOPs": "-", "images/s": "164",
        "AP": "21.5 ± 2.1", "AP50": "40.0 ± 0.0", "APs": "10.0 ± 0.0",
    }


def test_differences_with_their_standard_error(groups, test_set):
    teacher, plain = groups
    table = tables.difference_table(groups, plain, test_set)
    assert (table.headers, table.rows) == (["minus plain", "AP", "AP50", "APs"], [["teacher", "+9.5", "+0.0", "+0.0"]])
    other = type(plain)("other", [plain.runs[1], plain.runs[0]])
    # sqrt(2 * 4.5 / 2): the variance of 20 and 23 is 4.5
    assert tables.difference_table([other, plain], plain, test_set).rows[0][:2] == ["other", "+0.0 ± 2.1"]


def test_classes_in_the_order_of_the_data_set(groups, test_set):
    table = tables.class_table(groups, test_set, order=["dog", "cat", "cow"])
    assert table.headers == ["class", "teacher", "plain"]
    assert table.rows == [["dog", "10.0", "10.0 ± 0.0"], ["cat", "30.0", "30.0 ± 0.0"]]
    assert [row[0] for row in tables.class_table(groups, test_set).rows] == ["cat", "dog"]


def test_metrics_of_a_voc_run(data, tmp_path, test_set):
    metrics = {"AP": 1.0, "AP50": 3.0, "AP75": 0.5, "AP55": 2.0}
    groups = group_runs([("", read_run(write_run(tmp_path / "run", data=data, metrics=metrics)))])
    table = tables.main_table(groups, {"run": Measures()}, test_set)
    assert table.headers == ["model", "AP", "AP50", "AP75", "iterations", "training time"]
    assert tables.class_table(groups, test_set) is None
    [line] = csv.DictReader(io.StringIO(tables.csv_text(groups, {"run": Measures()}, test_set)))
    assert line["AP55"] == "2.0" and line["APs"] == line["images_per_second"] == ""


def test_csv_has_a_line_a_run_in_full_precision(groups, test_set):
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(groups, MEASURED, test_set))))
    assert [(line["model"], line["seed"], line["AP"]) for line in lines] == [
        ("teacher", "1", "31.0"), ("plain", "1", "20.0"), ("plain", "2", "23.0")
    ]
    first = lines[0]
    assert (first["parameters"], first["multiply_adds"]) == ("3119064", "130659840")
    assert first["images_per_second"] == "43.0012"
    assert first["AP75"] == "nan" and first["AP-cat"] == "30.0" and first["APl"] == ""
    assert first["train_seconds"] == "1005.0" and first["finished"] == "True" and first["test_set"] == test_set


def test_markdown_and_text():
    table = tables.Table(["model", "AP"], [["a|b", "1.0"]])
    assert table.markdown().splitlines() == ["| model   |   AP |", "|:--------|-----:|", "| a\\|b    |  1.0 |"]
    assert table.text().splitlines() == ["model      AP", "-------  ----", "a|b       1.0"]

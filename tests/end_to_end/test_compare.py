"""tools/compare.py on what train_net.py leaves behind."""

from __future__ import annotations

import csv

import pytest

from .runs import ROOT, scalars


def test_comparison_of_real_runs(server, teacher, plain, distilled, tmp_path):
    runs = {"teacher": teacher, "plain": plain, "distilled": distilled}
    folders = [f"{name}={run.folder}" for name, run in runs.items()]
    arguments = (*folders, "--baseline", "plain", "--images", 1, "--no-speed", "--output", tmp_path)
    outcome = server.run(*arguments, script=ROOT / "tools" / "compare.py").succeeded()
    assert "minus plain" in outcome.stdout and "note: " not in outcome.stderr
    with open(tmp_path / "comparison.csv", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for name, run in runs.items():
        values = scalars(run.folder)
        for metric in ("AP", "AP50", "AP-cat"):
            assert float(rows[name][metric]) == pytest.approx(values[f"bbox/{metric}"], nan_ok=True)
        assert float(rows[name]["train_seconds"]) == values["train_seconds"]
    assert rows["plain"]["iterations"] == "8" and rows["teacher"]["iterations"] == "40"
    parameters = {name: int(row["parameters"]) for name, row in rows.items()}
    assert parameters["plain"] == parameters["distilled"] < parameters["teacher"]

"""tools/compare.py on small real runs: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2_distill.apps.comparison.groups import group_runs
from d2_distill.apps.comparison.report import Options, compare_runs, write
from d2_distill.apps.comparison.runs import read_run

from ..apps.comparison.small_runs import METRICS, write_data, write_run
from ..data.small_sets import write_voc

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare  # noqa: E402

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, two seeds of a student that was distilled, and a plain one that is still trained."""
    root = tmp_path_factory.mktemp("compared_runs")
    data = write_data(root / "compared_by_the_tool")
    write_run(root / "teacher", data=data, RETINANET__NUM_CONVS=3)
    student = {"META_ARCHITECTURE": "Distiller", "RETINANET__NUM_CONVS": 1}
    for seed, ap in ((1, 24.0), (2, 27.0)):
        write_run(root / "distilled" / f"seed{seed}", data=data, seed=seed, metrics={**METRICS, "AP": ap}, **student)
    write_run(root / "student", data=data, checkpoint="model_0000014.pth", RETINANET__NUM_CONVS=1)
    return root


def run(capsys, *arguments):
    """The streams of a call that must succeed."""
    compare.main([*map(str, arguments)])
    return capsys.readouterr()


def cells(line):
    return [cell for cell in line.split("  ") if cell.strip()]


def test_table_files_and_pictures(runs, tmp_path, capsys):
    seeds = sorted((runs / "distilled").iterdir())
    printed = run(
        capsys, f"big={runs / 'teacher'}", *seeds, runs / "student", "--unfinished", "--baseline", "big",
        "--images", 2, "--pick", "differ", "--score-threshold", 0, "--output", tmp_path / "out",
    )
    lines = [[cell.strip() for cell in cells(line)] for line in printed.out.splitlines()]
    header = next(line for line in lines if line[:1] == ["model"])
    assert header == [
        "model", "seeds", "parameters", "GFLOPs", "images/s", "AP", "AP50", "APs", "iterations", "training time"
    ]
    found = {line[0]: dict(zip(header, line)) for line in lines if len(line) == len(header)}
    assert {name: found[name]["AP"] for name in ("big", "distilled", "student *")} == {
        "big": "20.0", "distilled": "25.5 ± 2.1", "student *": "20.0"
    }
    assert found["distilled"]["seeds"] == "2" and found["distilled"]["parameters"] == found["student *"]["parameters"]
    assert ["distilled", "+5.5", "+0.0", "+0.0"] in lines  # minus big
    assert ["cat", "30.0", "30.0 ± 0.0", "30.0"] in lines
    assert f"note: {runs / 'student'} (student) is not finished: 20 iterations." in printed.err

    files = ["comparison.md", "comparison.csv", "ap.png", "losses.png", "cost.png", "classes.png", "detections.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    assert printed.out.endswith(f"Written to {tmp_path / 'out'}: {', '.join(files)}\n")
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in page for name in files[2:]) and "| distilled " in page and "not finished" in page
    with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["seed"], row["AP"], row["finished"]) for row in rows] == [
        ("big", "1", "20.0", "True"), ("distilled", "1", "24.0", "True"), ("distilled", "2", "27.0", "True"),
        ("student", "1", "20.0", "False"),
    ]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    for name in files[2:]:
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels.std() > 5


def test_pascal_voc_runs_and_a_model_that_finds_nothing(tmp_path, capsys):
    row = write_voc(tmp_path / "compared_by_voc_rules")
    data = {"VOC": (row,), "TEST": (row[0],)}
    found = {"AP": 12.0, "AP50": 30.0, "AP75": 8.0, "AP55": 25.0, "AP-cat": 12.0, "AP-dog": 12.0}
    good = write_run(tmp_path / "good", data=data, metrics=found)
    nothing = dict.fromkeys(found, float("nan"))
    bad = write_run(tmp_path / "bad", data=data, seed=2, metrics=nothing, FPN__OUT_CHANNELS=16)
    printed = run(capsys, good, bad, "--baseline", "bad", "--images", 1, "--output", tmp_path / "out")
    table = [[cell.strip() for cell in cells(line)] for line in printed.out.splitlines()]
    assert ["class", "good", "bad"] in table and ["cat", "12.0", "nan"] in table
    assert "APs" not in printed.out and "AP55" not in printed.out and "note" not in printed.err
    assert (tmp_path / "out" / "detections.png").is_file()


def test_without_the_images_the_numbers_are_compared(tmp_path, capsys):
    gone = {"COCO": (("gone_val", "gone.json", "gone"),), "TEST": ("gone_val",)}
    folder = write_run(tmp_path / "run", data=gone)
    output = tmp_path / "out"
    output.mkdir()
    (output / "detections.png").write_text("of an earlier comparison")
    (output / "mine.txt").touch()
    printed = run(capsys, folder, "--output", output)
    assert "note: Left out, for want of the test images: GFLOPs, images/s and detections. DATASETS.COCO" in printed.err
    assert "GFLOPs" not in printed.out and "parameters" in printed.out
    assert sorted(path.name for path in output.iterdir()) == [
        "ap.png", "classes.png", "comparison.csv", "comparison.md", "losses.png", "mine.txt"
    ]


def test_without_matplotlib_there_are_no_plots(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    printed = run(capsys, runs / "teacher", "--no-speed", "--images", 1, "--output", tmp_path)
    assert "note: Left out: plots. Pictures are drawn with matplotlib; run `pip install matplotlib`." in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "comparison.md", "detections.png"]
    assert "images/s" not in printed.out
    assert "Left out: plots" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_files_are_replaced_together_or_not_at_all(runs, tmp_path):
    comparison = compare_runs(
        group_runs([("", read_run(runs / "teacher"))]), Options(speed=False, images=1), progress=lambda text: None
    )
    (tmp_path / "comparison.md").write_text("earlier")
    comparison.records = [{**comparison.records[0], "file_name": str(tmp_path / "none.png")}]
    with pytest.raises(OSError, match="none.png"):
        write(comparison, tmp_path, progress=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.md"]
    assert (tmp_path / "comparison.md").read_text() == "earlier"


def test_mistakes_are_one_sentence(runs, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            compare.main(["--output", str(tmp_path / "out"), *map(str, arguments)])
        return str(stop.value.code)

    assert refused(tmp_path / "none").startswith(f"error: {tmp_path / 'none'} has no config.yaml, so it is no output")
    assert "student has no model_final.pth as its last checkpoint" in refused(runs / "student")
    assert refused(runs / "teacher", "--baseline", "plain") == (
        "error: --baseline plain is none of the compared models, teacher."
    )
    (tmp_path / "file").touch()
    assert refused(runs / "teacher", "--no-speed", "--output", tmp_path / "file") == (
        f"error: --output {tmp_path / 'file'} is a file; name a folder."
    )
    assert refused("=folder") == refused(runs / "teacher", "--images", "-1") == "2"
    message = capsys.readouterr().err
    assert "'=folder' is neither FOLDER nor NAME=FOLDER" in message and "'-1' is not a whole number from 0 on" in message
    assert not (tmp_path / "out").exists()


def test_folders_with_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert compare.named_folder(str(folder)) == ("", folder)
    assert compare.named_folder(f"slow={folder}") == ("slow", folder)

"""tools/export.py checkpoint: the exported file is the student, for train_net.py as for anyone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .runs import ROOT, average_precision, checkpoint, scalars

TOOL = ROOT / "tools" / "export.py"


def export(server, weights: Path, output: Path, *options: str) -> Path:
    server.run("checkpoint", weights, output, *options, script=TOOL).succeeded()
    [written] = output.parent.glob("*")
    return written


def test_exported_student_is_the_student(server, distilled, plain, tmp_path):
    written = export(server, distilled.weights, tmp_path / "export" / "student.pth")
    content, original = checkpoint(written), checkpoint(distilled.weights)
    assert list(content) == ["model"] and set(original) >= {"model", "distill", "trainer", "iteration"}
    assert all(torch.equal(value, original["model"][name]) for name, value in content["model"].items())
    assert content["model"].keys() == original["model"].keys() == checkpoint(plain.weights)["model"].keys()
    assert written.stat().st_size < distilled.weights.stat().st_size / 2

    arguments = ("--config-file", plain.config, "--eval-only", "MODEL.WEIGHTS", written)
    outcome = server.run(*arguments, "OUTPUT_DIR", tmp_path).succeeded()
    assert average_precision(outcome)[0] == pytest.approx(scalars(distilled.folder)["bbox/AP"], abs=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_exported_checkpoint_is_evaluated_alike(server, teacher, tmp_path, half):
    """The one detector here that finds something."""
    options = ["--half"] if half else []
    written = export(server, teacher.weights, tmp_path / "export" / "teacher.pth", *options)
    arguments = ("--config-file", teacher.config, "--eval-only", "MODEL.WEIGHTS", written)
    outcome = server.run(*arguments, "OUTPUT_DIR", tmp_path).succeeded()
    expected = [scalars(teacher.folder)[f"bbox/{name}"] for name in ("AP", "AP50")]
    assert expected[1] > 20
    assert average_precision(outcome)[:2] == pytest.approx(expected, abs=5.0 if half else 1e-4)


def test_training_starts_from_an_exported_student(server, distilled, plain, tmp_path):
    written = export(server, distilled.weights, tmp_path / "export" / "student.pth", "--half")
    arguments = ("--config-file", plain.config, "MODEL.WEIGHTS", written, "SOLVER.MAX_ITER", 1)
    server.run(*arguments, "OUTPUT_DIR", tmp_path / "run", "DATASETS.TEST", "()").succeeded()
    trained = checkpoint(tmp_path / "run" / "model_final.pth")["model"]
    assert {v.dtype for v in trained.values() if v.is_floating_point()} == {torch.float32}

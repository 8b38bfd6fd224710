"""SIGINT and SIGTERM end a run after its step, with a checkpoint that is a student's and resumes exactly."""

from __future__ import annotations

import signal

import pytest

from .runs import (
    QUIET,
    RECORDER,
    TINY,
    assert_same_run,
    checkpoint,
    distiller,
    losses,
    wait_for_losses,
    write_config,
)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_stops_after_the_step_and_resumes_exactly(server, recorded, tmp_path, name, code):
    arguments = ("--config-file", recorded.config, "--resume", "OUTPUT_DIR", tmp_path)
    stopped = server.run(*arguments, script=RECORDER, SIGNAL_AT=f"{name} 4 0")
    assert stopped.code == code and not stopped.stderr.count("Traceback")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    line = f"Stopped by {name} after iteration 4; --resume continues from model_0000004.pth."
    assert stopped.stdout.count(line) == (tmp_path / "log.txt").read_text().count(line) == 1
    server.run(*arguments, script=RECORDER).succeeded()
    assert_same_run(tmp_path, recorded.folder, iterations=range(8))


def test_at_the_iteration_of_a_checkpoint(server, recorded, tmp_path):
    arguments = ("--config-file", recorded.config, "--resume", "OUTPUT_DIR", tmp_path)
    assert server.run(*arguments, script=RECORDER, SIGNAL_AT="SIGTERM 5 0").code == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    server.run(*arguments, script=RECORDER).succeeded()
    assert_same_run(tmp_path, recorded.folder, iterations=range(8))


def test_in_the_last_iteration_the_run_just_ends(server, recorded, tmp_path):
    arguments = ("--config-file", recorded.config, "OUTPUT_DIR", tmp_path)
    server.run(*arguments, script=RECORDER, SIGNAL_AT="SIGTERM 7 0").succeeded()
    assert_same_run(tmp_path, recorded.folder, iterations=range(8))


def test_checkpoint_of_an_interrupted_distillation_is_the_student_s(server, data, teacher, plain, tmp_path):
    config = write_config(
        tmp_path / "config.yaml", TINY, data, QUIET,
        distiller(teacher.config, teacher.weights, "CrossKD", "FeatureImitation"),
    )
    arguments = ("--config-file", config, "OUTPUT_DIR", tmp_path / "out")
    assert server.run(*arguments, script=RECORDER, SIGNAL_AT="SIGTERM 1 0").code == 143
    weights = tmp_path / "out" / "model_0000001.pth"
    assert checkpoint(weights)["model"].keys() == checkpoint(plain.weights)["model"].keys()
    arguments = ("--config-file", plain.config, "--eval-only", "MODEL.WEIGHTS", weights)
    server.run(*arguments, "OUTPUT_DIR", tmp_path / "evaluation").succeeded()


def test_ctrl_c_with_workers(server, data, tmp_path):
    """A terminal sends the signal to the workers, too; the step is finished all the same."""
    config = write_config(
        tmp_path / "config.yaml", TINY, data, QUIET,
        {"DATALOADER": {"NUM_WORKERS": 2}, "SOLVER": {"MAX_ITER": 100000, "CHECKPOINT_PERIOD": 100000}},
    )
    (started,) = server.start("--config-file", config, "OUTPUT_DIR", tmp_path / "out", script=RECORDER)
    wait_for_losses(tmp_path / "out")
    server.signal(started, signal.SIGINT, group=True)
    outcome = server.wait([started])
    assert outcome.code == 130 and "Traceback" not in outcome.stdout + outcome.stderr
    last = losses(tmp_path / "out")[-1]["iteration"]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    assert checkpoint(tmp_path / "out" / f"model_{last:07d}.pth")["iteration"] == last

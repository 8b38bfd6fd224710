"""A killed run continues as if it had not been killed: all later losses are the same, bit for bit."""

from __future__ import annotations

import shutil

import pytest

from .runs import (
    FASTER_RCNN,
    QUIET,
    RECORDER,
    TF_HEAD,
    TINY,
    assert_equal,
    assert_same_run,
    checkpoint,
    distiller,
    losses,
    merged,
    write_config,
)

KILLED_AT = 5  # iteration; the checkpoint before it is that of iteration 2
ITERATIONS = [*range(KILLED_AT), *range(3, 8)]


def kill_and_resume(server, config, folder):
    arguments = ("--config-file", config, "--resume", "OUTPUT_DIR", folder)
    killed = server.run(*arguments, script=RECORDER, SIGNAL_AT=f"SIGKILL {KILLED_AT} 0")
    assert killed.code == 128 + 9
    assert (folder / "last_checkpoint").read_text() == "model_0000002.pth"
    server.run(*arguments, script=RECORDER).succeeded()


def test_killed_run(server, recorded, tmp_path):
    kill_and_resume(server, recorded.config, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", recorded.folder, iterations=ITERATIONS)


# Of two methods one ends right before the iteration that a killed run resumes at, the other one right after it.
ENDED = {
    "MODEL": {"DISTILL": {"CROSSKD": {"SCHEDULE": [["EarlyStop", 2]]}, "PKD": {"SCHEDULE": [["EarlyStop", 3]]}}}
}


@pytest.mark.parametrize("kind", ["Distiller", "Balanced", "Ended methods", "Faster R-CNN", "TF-HEAD"])
def test_killed_run_of_another_kind(server, data, teacher, tmp_path, kind):
    special = {
        "Distiller": distiller(teacher.config, teacher.weights, "CrossKD", "PKD", "FeatureImitation"),
        "Balanced": merged(
            distiller(teacher.config, teacher.weights, "CrossKD", "PKD"),
            {"MODEL": {"DISTILL": {"BALANCE": "auto", "BALANCE_PERIOD": 2}}},
        ),
        "Ended methods": merged(distiller(teacher.config, teacher.weights, "CrossKD", "PKD"), ENDED),
        "Faster R-CNN": FASTER_RCNN,
        "TF-HEAD": TF_HEAD,
    }[kind]
    config = write_config(tmp_path / "config.yaml", TINY, data, QUIET, special)
    server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "whole", script=RECORDER).succeeded()
    kill_and_resume(server, config, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole", iterations=ITERATIONS)


def test_killed_run_with_workers_and_a_random_seed(server, data, tmp_path):
    """The seed that was drawn is kept: the same data come in the same order, from any number of workers."""
    config = write_config(tmp_path / "config.yaml", TINY, data, QUIET, {"SEED": -1})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    every_step = ("SOLVER.CHECKPOINT_PERIOD", 1)
    server.run("--config-file", config, "OUTPUT_DIR", whole, *every_step, script=RECORDER).succeeded()

    # What the whole run had written when it was killed at iteration 5.
    killed.mkdir()
    for name in ("config.yaml", "model_0000002.pth"):
        shutil.copy(whole / name, killed)
    (killed / "last_checkpoint").write_text("model_0000002.pth")
    rows = (whole / "losses.jsonl").read_text().splitlines(keepends=True)
    (killed / "losses.jsonl").write_text("".join(rows[:KILLED_AT]))
    arguments = ("--config-file", config, "--resume", "OUTPUT_DIR", killed, "DATALOADER.NUM_WORKERS", 2)
    server.run(*arguments, script=RECORDER).succeeded()
    assert_same_run(killed, whole, iterations=ITERATIONS)


def test_two_runs_with_a_random_seed_differ(server, data, tmp_path):
    short = {"SEED": -1, "SOLVER": {"MAX_ITER": 2}}
    config = write_config(tmp_path / "config.yaml", TINY, data, QUIET, short)
    for name in "ab":
        server.run("--config-file", config, "OUTPUT_DIR", tmp_path / name, script=RECORDER).succeeded()
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_resumed_without_a_checkpoint_it_starts_anew(server, plain, tmp_path):
    server.run("--config-file", plain.config, "--resume", "OUTPUT_DIR", tmp_path, script=RECORDER).succeeded()
    assert_equal(checkpoint(tmp_path / "model_final.pth")["model"], checkpoint(plain.weights)["model"])


def test_finished_run_is_only_evaluated_again(server, plain, tmp_path):
    shutil.copytree(plain.folder, tmp_path / "out")
    arguments = ("--config-file", plain.config, "--resume", "OUTPUT_DIR", tmp_path / "out")
    outcome = server.run(*arguments).succeeded()
    assert outcome.stdout.count("copypaste: AP,AP50,AP75") == 1
    assert (tmp_path / "out" / "model_final.pth").read_bytes() == plain.weights.read_bytes()


def test_longer_schedule(server, data, plain, tmp_path):
    """A run whose MAX_ITER is raised goes on."""
    shutil.copytree(plain.folder, tmp_path / "out")
    arguments = ("--config-file", plain.config, "--resume", "OUTPUT_DIR", tmp_path / "out")
    server.run(*arguments, "SOLVER.MAX_ITER", 10, script=RECORDER).succeeded()
    assert [row["iteration"] for row in losses(tmp_path / "out")] == [8, 9]

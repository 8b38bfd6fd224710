"""Several processes on the CPU: started by train_net.py, by torchrun, or with torchrun's variables."""

from __future__ import annotations

import json
import signal

import pytest

from .runs import (
    FASTER_RCNN,
    RECORDER,
    TINY,
    assert_same_run,
    average_precision,
    checkpoint,
    distiller,
    free_port,
    losses,
    run_program,
    scalars,
    wait_for_losses,
    write_config,
)


@pytest.fixture(scope="module")
def recorded_by_two(server, recorded, runs):
    folder = runs / "recorded_by_two"
    arguments = ("--config-file", recorded.config, "OUTPUT_DIR", folder)
    server.run(*arguments, script=RECORDER, processes=2).succeeded()
    return folder


def test_evaluation_gives_the_result_of_one_process(server, teacher, tmp_path):
    arguments = ("--config-file", teacher.config, "--eval-only", "MODEL.WEIGHTS", teacher.weights)
    one = server.run(*arguments, "OUTPUT_DIR", tmp_path / "one").succeeded()
    two = server.run(*arguments, "OUTPUT_DIR", tmp_path / "two", processes=2).succeeded()
    assert average_precision(one)[0] > 5
    assert average_precision(two) == average_precision(one)
    left, right = (json.loads((tmp_path / name / "inference" / "coco_instances_results.json").read_text())
                   for name in ("one", "two"))
    assert left and left == right
    assert (tmp_path / "two" / "inference" / "log.txt.rank1").exists()


def test_torchrun_distils_and_every_parameter_has_a_gradient(data, teacher, tmp_path):
    """DDP, which is told of no unused parameters, would stop at the second iteration."""
    config = write_config(
        tmp_path / "config.yaml", TINY, data, {"SOLVER": {"MAX_ITER": 3}},
        distiller(teacher.config, teacher.weights, "CrossKD", "PKD", "FeatureImitation"),
    )
    run_program(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(),
        "train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path / "out",
    ).succeeded()
    values = scalars(tmp_path / "out")
    assert {"loss_cls", "loss_crosskd_cls", "loss_crosskd_box", "loss_pkd", "loss_imitation"} <= set(values)
    assert "bbox/AP" in values and values["train_seconds"] > 0
    assert (tmp_path / "out" / "log.txt.rank1").exists()


def test_two_stage_detector(server, data, tmp_path):
    config = write_config(tmp_path / "config.yaml", TINY, data, FASTER_RCNN, {"SOLVER": {"MAX_ITER": 2}})
    server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "out", processes=2).succeeded()
    assert scalars(tmp_path / "out")["loss_rpn_cls"] > 0


def test_a_signal_to_one_stops_both_and_they_resume_exactly(server, recorded, recorded_by_two, tmp_path):
    arguments = ("--config-file", recorded.config, "--resume", "OUTPUT_DIR", tmp_path)
    assert server.run(*arguments, script=RECORDER, processes=2, SIGNAL_AT="SIGTERM 4 1").code == 143
    state = checkpoint(tmp_path / "model_0000004.pth")["trainer"]["hooks"]["LossNormalizers"]["values"]
    assert len(state) == 2 and state[0].keys() == state[1].keys() == {"module"}
    server.run(*arguments, script=RECORDER, processes=2).succeeded()
    assert_same_run(tmp_path, recorded_by_two, iterations=range(8))


def test_killed_run_resumes_exactly(server, recorded, recorded_by_two, tmp_path):
    arguments = ("--config-file", recorded.config, "--resume", "OUTPUT_DIR", tmp_path)
    killed = server.run(*arguments, script=RECORDER, processes=2, SIGNAL_AT="SIGKILL 5 0")
    assert killed.codes[0] == 128 + 9 and killed.codes[1] != 0
    server.run(*arguments, script=RECORDER, processes=2).succeeded()
    assert_same_run(tmp_path, recorded_by_two, iterations=[*range(5), *range(3, 8)])


def test_train_net_starts_processes_and_passes_a_signal_on(server, recorded, tmp_path):
    (started,) = server.start(
        "--num-gpus", 2, "--dist-url", "auto", "--config-file", recorded.config,
        "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 100000,
        script=RECORDER,
    )
    wait_for_losses(tmp_path / "out")
    server.signal(started, signal.SIGTERM)
    outcome = server.wait([started])
    assert outcome.code == 143 and "Traceback" not in outcome.stdout + outcome.stderr, outcome.stderr
    last = losses(tmp_path / "out")[-1]["iteration"]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    assert (tmp_path / "out" / "log.txt.rank1").exists()

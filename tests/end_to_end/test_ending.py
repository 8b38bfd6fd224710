"""Best checkpoint, early stopping, averaged weights, accumulated gradients and kept checkpoints, across a kill."""

from __future__ import annotations

import json
import shutil

import pytest

from .conftest import Trained
from .runs import (
    RECORDER,
    TINY,
    assert_equal,
    assert_same_run,
    average_precision,
    checkpoint,
    contents,
    distiller,
    losses,
    scalars,
    write_config,
)

EVERYTHING = {
    "SOLVER": {
        "BASE_LR": 0.01,
        "IMS_PER_BATCH": 4,
        "ACCUMULATION_STEPS": 2,
        "CHECKPOINTS_KEPT": 1,
        "EARLY_STOPPING": {"PATIENCE": 3},
        "EMA": {"ENABLED": True, "DECAY": 0.4},
    },
    "TEST": {"EVAL_PERIOD": 3},
}
# Nothing is detected, so that no evaluation is better than another.
BLIND = {"MODEL": {"RETINANET": {"SCORE_THRESH_TEST": 0.999}}, "TEST": {"EVAL_PERIOD": 2}}
IMPATIENT = {"SOLVER": {"EARLY_STOPPING": {"PATIENCE": 2}, "MAX_ITER": 8}}


def precisions(folder):
    """AP by iteration, as metrics.json has it; a later line goes before an earlier one."""
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {row["iteration"]: row["bbox/AP"] for row in rows if "bbox/AP" in row}


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


@pytest.fixture(scope="module")
def whole(server, data, runs, teacher):
    """A distillation with all of it that is not interrupted."""
    methods = distiller(teacher.config, teacher.weights, "CrossKD", "PKD", "FeatureImitation")
    methods["MODEL"]["DISTILL"]["GRADIENT_RATIO_PERIOD"] = 4
    config = write_config(runs / "everything.yaml", TINY, data, methods, EVERYTHING)
    server.run("--config-file", config, "OUTPUT_DIR", runs / "everything", script=RECORDER).succeeded()
    return Trained(config, runs / "everything")


def test_what_a_run_leaves(whole):
    assert checkpoints(whole.folder) == ["model_0000005.pth", "model_best.pth", "model_final.pth"]
    assert (whole.folder / "last_checkpoint").read_text() == "model_final.pth"
    found = precisions(whole.folder)
    assert sorted(found) == [5, 8]  # what the writer found after the last iteration, and the final evaluation
    best = checkpoint(whole.folder / "model_best.pth")
    assert best.keys() == {"model", "best"}
    assert best["best"]["value"] >= max(found.values()) > 0
    assert best["best"]["iteration"] in (2, 5, 7)
    assert best["best"]["metric"] == "bbox/AP"
    # Reported once a step, although a step has two parts.
    assert (whole.folder / "log.txt").read_text().count("Gradients at the features") == 2


def test_periodic_checkpoints_hold_the_trained_weights_and_the_final_one_their_average(whole):
    periodic, final = (checkpoint(whole.folder / name) for name in ("model_0000005.pth", "model_final.pth"))
    assert periodic["ema"].keys() == {"average"} and final["ema"].keys() == {"trained"}
    name = "head.cls_score.weight"
    assert not periodic["model"][name].equal(periodic["ema"]["average"][name])
    assert not final["model"][name].equal(final["ema"]["trained"][name])
    assert periodic["model"].keys() == periodic["ema"]["average"].keys() == final["model"].keys()


@pytest.mark.parametrize("missed", [False, True], ids=["after the evaluation", "before the evaluation"])
def test_killed_run(server, whole, tmp_path, missed):
    arguments = ("--config-file", whole.config, "--resume", "OUTPUT_DIR", tmp_path)
    assert server.run(*arguments, script=RECORDER, SIGNAL_AT="SIGKILL 5 0").code == 128 + 9
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    if missed:  # what a kill between the checkpoint of iteration 2 and its evaluation leaves
        (tmp_path / "model_best.pth").unlink()
    server.run(*arguments, script=RECORDER).succeeded()
    assert_same_run(tmp_path, whole.folder, iterations=[*range(5), *range(3, 8)])
    assert checkpoints(tmp_path) == checkpoints(whole.folder)
    for name in checkpoints(tmp_path):
        found, expected = checkpoint(tmp_path / name), checkpoint(whole.folder / name)
        for entry in {"model", "ema", "distill", "best"} & expected.keys():
            assert_equal(found[entry], expected[entry])
        if "trainer" in expected:
            ours, theirs = (state["trainer"]["hooks"]["EarlyStopping"] for state in (found, expected))
            assert ours == theirs
    assert precisions(tmp_path) == precisions(whole.folder)


def test_longer_run_continues_from_the_trained_weights(server, whole, tmp_path):
    """A finished run whose MAX_ITER is raised has the losses of one that was as long from the start."""
    longer = ("SOLVER.MAX_ITER", 9)
    server.run("--config-file", whole.config, "OUTPUT_DIR", tmp_path / "long", *longer, script=RECORDER).succeeded()
    shutil.copytree(whole.folder, tmp_path / "out")
    arguments = ("--config-file", whole.config, "--resume", "OUTPUT_DIR", tmp_path / "out", *longer)
    server.run(*arguments, script=RECORDER).succeeded()
    assert losses(tmp_path / "out")[8:] == losses(tmp_path / "long")[8:]
    left, right = (checkpoint(tmp_path / name / "model_final.pth") for name in ("out", "long"))
    assert_equal(left["model"], right["model"])
    assert_equal(left["ema"], right["ema"])


@pytest.mark.parametrize("name", ["model_best.pth", "model_final.pth"])
def test_evaluation_repeats_the_logged_precision(server, data, whole, tmp_path, name):
    config = write_config(tmp_path / "plain.yaml", TINY, data)
    arguments = ("--config-file", config, "--eval-only", "MODEL.WEIGHTS", whole.folder / name)
    outcome = server.run(*arguments, "OUTPUT_DIR", tmp_path).succeeded()
    state = checkpoint(whole.folder / name)
    expected = state["best"]["value"] if "best" in state else precisions(whole.folder)[8]
    assert average_precision(outcome)[0] == round(expected, 4)


def test_two_processes(server, whole, tmp_path):
    """Their batch norms have statistics of their own; the evaluated ones are those that are saved."""
    arguments = ("--config-file", whole.config, "--resume", "OUTPUT_DIR")
    two = {"script": RECORDER, "processes": 2}
    server.run(*arguments, tmp_path / "whole", **two).succeeded()
    assert server.run(*arguments, tmp_path / "killed", **two, SIGNAL_AT="SIGKILL 5 0").codes[0] == 128 + 9
    server.run(*arguments, tmp_path / "killed", **two).succeeded()
    assert_same_run(tmp_path / "killed", tmp_path / "whole", iterations=[*range(5), *range(3, 8)])
    assert precisions(tmp_path / "killed") == precisions(tmp_path / "whole")
    found, expected = (checkpoint(tmp_path / name / "model_best.pth") for name in ("killed", "whole"))
    assert_equal(found, expected)

    arguments = ("--config-file", whole.config, "--eval-only", "MODEL.WEIGHTS", tmp_path / "whole" / "model_best.pth")
    outcome = server.run(*arguments, "OUTPUT_DIR", tmp_path / "again").succeeded()
    assert average_precision(outcome)[0] == round(expected["best"]["value"], 4) > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_early_stopping(server, data, tmp_path, processes):
    config = write_config(tmp_path / "config.yaml", TINY, data, BLIND, IMPATIENT)
    folder = tmp_path / "out"
    arguments = ("--config-file", config, "--resume", "OUTPUT_DIR", folder)
    outcome = server.run(*arguments, script=RECORDER, processes=processes).succeeded()
    assert [row["iteration"] for row in losses(folder)] == [0, 1, 2, 3]
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert outcome.stdout.count("Stopped early after iteration 3: in 2 evaluations bbox/AP") == 1
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert checkpoint(folder / "model_final.pth")["iteration"] == 3
    assert sorted(precisions(folder)) == [3]
    assert "total_loss" in scalars(folder)

    before = (folder / "model_final.pth").read_bytes()
    again = server.run(*arguments, script=RECORDER, processes=processes).succeeded()
    assert len(losses(folder)) == 4 and again.stdout.count("Stopped early after iteration 3") == 1
    assert again.stdout.count("Evaluation results") + again.stdout.count("Results on") > 0
    assert (folder / "model_final.pth").read_bytes() == before

    server.run(*arguments, "SOLVER.EARLY_STOPPING.PATIENCE", 3, script=RECORDER, processes=processes).succeeded()
    assert [row["iteration"] for row in losses(folder)] == [0, 1, 2, 3, 4, 5]


def test_run_that_was_killed_before_it_could_stop(server, data, tmp_path):
    config = write_config(tmp_path / "config.yaml", TINY, data, BLIND, IMPATIENT, {"SOLVER": {"CHECKPOINT_PERIOD": 4}})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    server.run("--config-file", config, "OUTPUT_DIR", whole, script=RECORDER).succeeded()
    killed.mkdir()
    for name in ("config.yaml", "model_0000003.pth"):
        shutil.copy(whole / name, killed)
    (killed / "last_checkpoint").write_text("model_0000003.pth")
    outcome = server.run("--config-file", config, "--resume", "OUTPUT_DIR", killed, script=RECORDER).succeeded()
    assert "Stopped early after iteration 3" in outcome.stdout
    assert not (killed / "losses.jsonl").exists()
    left, right = (checkpoint(folder / "model_final.pth") for folder in (killed, whole))
    assert left["iteration"] == right["iteration"] == 3
    assert_equal(left["model"], right["model"])
    assert_equal(left["trainer"]["_trainer"], right["trainer"]["_trainer"])
    assert left["trainer"]["hooks"]["EarlyStopping"] == right["trainer"]["hooks"]["EarlyStopping"]


def test_first_of_several_test_sets_decides(server, data, tmp_path):
    config = write_config(tmp_path / "config.yaml", TINY, data, EVERYTHING, {"SOLVER": {"MAX_ITER": 3}})
    arguments = ("--config-file", config, "OUTPUT_DIR", tmp_path / "out", "DATASETS.TEST", "('train_set', 'val_set')")
    server.run(*arguments).succeeded()
    best = checkpoint(tmp_path / "out" / "model_best.pth")["best"]
    values = scalars(tmp_path / "out")
    assert (best["test_set"], best["value"]) == ("train_set", values["train_set/bbox/AP"])
    assert values["train_set/bbox/AP"] != values["val_set/bbox/AP"]


def test_pascal_voc(server, voc_data, tmp_path):
    config = write_config(tmp_path / "config.yaml", TINY, voc_data, EVERYTHING, {"SOLVER": {"MAX_ITER": 3, "IMS_PER_BATCH": 2}})
    server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "out").succeeded()
    best = checkpoint(tmp_path / "out" / "model_best.pth")["best"]
    assert best["value"] == scalars(tmp_path / "out")["bbox/AP"]


def test_best_checkpoint_can_be_switched_off(server, data, tmp_path):
    config = write_config(tmp_path / "config.yaml", TINY, data, {"SOLVER": {"MAX_ITER": 2}})
    for name, opts in {"off": ("TEST.EVAL_PERIOD", 1, "TEST.SAVE_BEST", False), "no period": ()}.items():
        server.run("--config-file", config, "OUTPUT_DIR", tmp_path / name, *opts).succeeded()
        assert checkpoints(tmp_path / name) == ["model_final.pth"]


@pytest.mark.parametrize("opts, sentence", [
    (("SOLVER.ACCUMULATION_STEPS", 0), "error: SOLVER.ACCUMULATION_STEPS is 0; set it"),
    (("SOLVER.ACCUMULATION_STEPS", 3), "error: SOLVER.IMS_PER_BATCH is 4, which 1 process cannot compute in"),
    (("SOLVER.EARLY_STOPPING.PATIENCE", -1), "error: SOLVER.EARLY_STOPPING.PATIENCE is -1; set it"),
    (("TEST.EVAL_PERIOD", 0), "error: SOLVER.EARLY_STOPPING.PATIENCE is 3, but TEST.EVAL_PERIOD is 0"),
    (("DATASETS.TEST", "()"), "error: SOLVER.EARLY_STOPPING.PATIENCE is 3, but DATASETS.TEST is empty"),
    (("SOLVER.EMA.DECAY", 1.0), "error: SOLVER.EMA.DECAY is 1.0; set it"),
    (("SOLVER.CHECKPOINTS_KEPT", -2), "error: SOLVER.CHECKPOINTS_KEPT is -2; set it"),
])
def test_bad_values(server, whole, tmp_path, opts, sentence):
    before = contents(tmp_path)
    outcome = server.run("--config-file", whole.config, "OUTPUT_DIR", tmp_path / "out", *opts)
    assert outcome.code == 1
    assert [line[: len(sentence)] for line in outcome.errors] == [sentence]
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()

"""Teacher, plain student, distilled student, and the evaluation of each, through train_net.py."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from d2_distill.engine.setup import load_config

from ..data.small_sets import write_voc
from .runs import QUIET, TINY, average_precision, checkpoint, contents, distiller, scalars, write_config

PLAIN_TERMS = {"loss_cls", "loss_box_reg"}
DISTILLED_TERMS = PLAIN_TERMS | {"loss_crosskd_cls", "loss_crosskd_box", "loss_pkd", "loss_imitation"}


@pytest.mark.parametrize(
    "name, terms", [("teacher", PLAIN_TERMS), ("plain", PLAIN_TERMS), ("distilled", DISTILLED_TERMS)]
)
def test_metrics_hold_every_term(request, name, terms):
    values = scalars(request.getfixturevalue(name).folder)
    assert {key for key in values if key.startswith("loss")} == terms
    assert all(math.isfinite(values[key]) for key in terms)
    assert values["train_seconds"] > 0 and values["lr"] > 0
    assert 0 <= values["bbox/AP"] <= 100 and (values["bbox/AP50"] > 20 or name != "teacher")


def test_tensorboard_holds_every_scalar(distilled):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(distilled.folder)).Reload()
    assert set(events.Tags()["scalars"]) >= DISTILLED_TERMS | {
        "total_loss", "lr", "data_time", "train_seconds", "bbox/AP", "bbox/AP50", "bbox/AP-cat", "bbox/AP-dog"
    }
    for name in (*DISTILLED_TERMS, "lr", "bbox/AP"):
        written = events.Scalars(name)[-1]
        assert written.value == pytest.approx(scalars(distilled.folder)[name], rel=1e-6, nan_ok=True)


def test_log_tells_the_teacher(distilled, teacher):
    log = (distilled.folder / "log.txt").read_text()
    assert log.count("Teacher: RetinaNet") == 1 and f"from {teacher.weights}, fingerprint" in log


def test_distilled_checkpoint_is_a_student_checkpoint(distilled, plain):
    ours, theirs = checkpoint(distilled.weights), checkpoint(plain.weights)
    assert {name: value.shape for name, value in ours["model"].items()} == {
        name: value.shape for name, value in theirs["model"].items()
    }
    assert set(ours) - set(theirs) == {"distill", "teacher"} and len(ours["distill"]) == 6  # adapters of three levels
    assert any(not torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


@pytest.mark.parametrize("trained", ["teacher", "plain", "distilled"])
def test_evaluation_gives_the_training_run_s_result(request, server, trained):
    run = request.getfixturevalue(trained)
    before = contents(run.folder)
    outcome = server.run("--config-file", run.config, "--eval-only", "MODEL.WEIGHTS", run.weights).succeeded()
    expected = [scalars(run.folder)[f"bbox/{name}"] for name in ("AP", "AP50", "AP75")]
    assert average_precision(outcome) == pytest.approx(expected, abs=1e-4)
    after = contents(run.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed >= {"inference/config.yaml", "inference/log.txt"}
    assert {name.partition("/")[0] for name in changed} == {"inference"}


def test_distilled_checkpoint_is_evaluated_without_distillation(server, distilled, plain, tmp_path):
    arguments = ("--config-file", plain.config, "--eval-only", "MODEL.WEIGHTS", distilled.weights)
    outcome = server.run(*arguments, "OUTPUT_DIR", tmp_path).succeeded()
    assert average_precision(outcome)[0] == pytest.approx(scalars(distilled.folder)["bbox/AP"], abs=1e-4)


def test_evaluation_needs_no_teacher(server, distilled, tmp_path):
    outcome = server.run(
        "--config-file", distilled.config, "--eval-only", "MODEL.WEIGHTS", distilled.weights,
        "MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "none.pth", "OUTPUT_DIR", tmp_path,
    ).succeeded()
    assert "Teacher" not in outcome.stdout


def test_evaluation_needs_no_training_data(server, plain, tmp_path):
    """A run's config and checkpoint, where there are only images to evaluate on."""
    cfg = load_config(str(plain.config), [])
    train, val = cfg.DATASETS.COCO
    gone = {"DATASETS": {"COCO": [[train[0], "gone.json", "gone"], list(val)], "CLASSES": list(cfg.DATASETS.CLASSES)}}
    config = write_config(tmp_path / "gone.yaml", {"_BASE_": str(plain.config)}, gone)
    arguments = ("--config-file", config, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", plain.weights)
    outcome = server.run("--eval-only", *arguments).succeeded()
    assert average_precision(outcome)[0] == pytest.approx(scalars(plain.folder)["bbox/AP"], abs=1e-4)
    assert "datasets/gone" in server.run(*arguments).errors[0]


def test_voc_evaluation(server, teacher, voc_data, tmp_path):
    config = write_config(tmp_path / "voc.yaml", {"_BASE_": str(teacher.config)}, voc_data)
    outcome = server.run(
        "--config-file", config, "--eval-only", "MODEL.WEIGHTS", teacher.weights, "OUTPUT_DIR", tmp_path
    ).succeeded()
    ap, ap50, ap75 = average_precision(outcome)
    assert 0 <= ap75 <= ap50 <= 100 and 0 <= ap <= 100 and "AP,AP50,AP75,AP55," in outcome.stdout


def test_without_a_gpu_the_cpu_is_used_and_the_log_says_so(server, data, tmp_path):
    gpu = {"MODEL": {"DEVICE": "cuda"}, "SOLVER": {"MAX_ITER": 1}}
    config = write_config(tmp_path / "config.yaml", TINY, data, QUIET, gpu)
    outcome = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "out").succeeded()
    for text in (outcome.stdout, (tmp_path / "out" / "log.txt").read_text()):
        assert text.count("MODEL.DEVICE is cuda, but there is no GPU: using the CPU.") == 1
    assert "WARNING" in outcome.stdout and "MODEL.DEVICE" not in outcome.stderr


def test_number_of_classes_is_that_of_the_data(server, data, tmp_path):
    """The run's config.yaml then tells it, so that a distillation's teacher needs no data."""
    wrong = {"MODEL": {"RETINANET": {"NUM_CLASSES": 7}}, "SOLVER": {"MAX_ITER": 1}}
    config = write_config(tmp_path / "teacher.yaml", TINY, data, QUIET, wrong)
    outcome = server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "teacher").succeeded()
    assert "MODEL.RETINANET.NUM_CLASSES is 2 (it was 7), for the classes of the data set " in outcome.stdout
    stored = yaml.safe_load((tmp_path / "teacher" / "config.yaml").read_text())
    assert stored["DATASETS"]["CLASSES"] == ["cat", "dog"] and stored["MODEL"]["RETINANET"]["NUM_CLASSES"] == 2
    server.run("--config-file", config, "--resume", "OUTPUT_DIR", tmp_path / "teacher").succeeded()

    stored["DATASETS"]["COCO"] = [[row[0], str(tmp_path / "gone.json"), row[2]] for row in stored["DATASETS"]["COCO"]]
    teacher = write_config(tmp_path / "gone.yaml", stored)
    pair = distiller(teacher, tmp_path / "teacher" / "model_final.pth", "CrossKD")
    config = write_config(tmp_path / "distilled.yaml", TINY, data, QUIET, wrong, pair)
    server.run("--config-file", config, "OUTPUT_DIR", tmp_path / "distilled").succeeded()
    server.run(
        "--config-file", config, "--eval-only", "MODEL.WEIGHTS", tmp_path / "distilled" / "model_final.pth",
        "DATASETS.TEST", f"('{data['DATASETS']['TEST'][0]}',)", "OUTPUT_DIR", tmp_path / "distilled",
    ).succeeded()


def test_data_named_on_the_command_line(server, data, tmp_path):
    """Both formats; the run's config.yaml then serves an evaluation, and a resume with the same command is the same run."""
    folder = tmp_path / "own"
    (_, *train), (_, *val) = data["DATASETS"]["COCO"]
    voc = write_voc(tmp_path / "voc", objects=([("dog", 5, 6, 20, 19)], [("cat", 3, 4, 20, 19)]))
    config = write_config(tmp_path / "config.yaml", TINY, {"DATASETS": {"TRAIN": ["coco_2017_train"]}})
    command = (
        "--config-file", config, "--train-data", *train, "--test-data", *val, "--test-data", voc[1], "train",
        "OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 1,
    )
    outcome = server.run(*command).succeeded()
    assert "MODEL.RETINANET.NUM_CLASSES is 2" in outcome.stdout and outcome.stdout.count("copypaste: AP,") == 2
    stored = yaml.safe_load((folder / "config.yaml").read_text())["DATASETS"]
    assert stored["TRAIN"] == ["train_set"] and stored["TEST"] == ["val_set", "voc_train"]
    assert stored["CLASSES"] == ["cat", "dog"]
    server.run("--resume", *command).succeeded()
    evaluation = ("--config-file", folder / "config.yaml", "--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth")
    server.run(*evaluation, "OUTPUT_DIR", tmp_path / "eval").succeeded()

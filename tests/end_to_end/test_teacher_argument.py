"""train_net.py --teacher: one argument distils, by the folder of a run or by config and weights."""

from __future__ import annotations

import yaml

from .runs import QUIET, TINY, assert_equal, checkpoint, scalars, write_config


def run(server, config, folder, *words):
    return server.run("--config-file", config, "--teacher", *words, "OUTPUT_DIR", folder)


def test_one_argument(server, data, teacher, tmp_path):
    config = write_config(tmp_path / "student.yaml", TINY, data, QUIET)
    by_folder, by_files = tmp_path / "folder", tmp_path / "files"
    run(server, config, by_folder, teacher.folder).succeeded()
    run(server, config, by_files, teacher.config, teacher.weights).succeeded()
    assert_equal(checkpoint(by_folder / "model_final.pth")["model"], checkpoint(by_files / "model_final.pth")["model"])
    kept = yaml.safe_load((by_folder / "config.yaml").read_text())["MODEL"]
    assert kept["META_ARCHITECTURE"] == "Distiller" and kept["DISTILL"]["STUDENT"] == "RetinaNet"
    assert kept["DISTILL"]["TEACHER"]["WEIGHTS"] == str(teacher.weights)
    log = (by_folder / "log.txt").read_text()
    assert '"auto" takes PKD' in log and "balanced by their gradients" in log
    assert "The run: " in log and "teacher " in log
    assert scalars(by_folder)["distill_weight/pkd"] > 0 and scalars(by_folder)["loss_pkd"] > 0
    # The student's checkpoint, as of any training.
    assert set(checkpoint(by_folder / "model_final.pth")) >= {"model", "balance"}


def test_methods_of_the_config_stay(server, data, teacher, tmp_path):
    config = write_config(tmp_path / "student.yaml", TINY, data, QUIET)
    folder = tmp_path / "run"
    words = (teacher.folder, "MODEL.DISTILL.METHODS", "FeatureImitation", "MODEL.DISTILL.BALANCE", "published")
    run(server, config, folder, *words).succeeded()
    assert "loss_imitation" in scalars(folder) and "balance" not in checkpoint(folder / "model_final.pth")


def test_refusals_write_nothing(server, data, teacher, tmp_path):
    config = write_config(tmp_path / "student.yaml", TINY, data, QUIET)
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((tmp_path / "empty",), "error: --teacher: the folder"),
        ((tmp_path / "none.yaml",), "error: MODEL.DISTILL.TEACHER.CONFIG_FILE: there is no file"),
        ((teacher.config, tmp_path / "none.pth"), "error: MODEL.DISTILL.TEACHER.WEIGHTS"),
        ((teacher.folder, "a", "b"), "error: --teacher has 3 values"),
    ):
        outcome = run(server, config, tmp_path / "out", *words)
        assert outcome.code == 1 and outcome.errors[0].startswith(message), outcome.errors
        assert not (tmp_path / "out").exists()


def test_two_processes(server, data, teacher, tmp_path):
    config = write_config(tmp_path / "student.yaml", TINY, data, QUIET, {"SOLVER": {"MAX_ITER": 3}})
    server.run(
        "--config-file", config, "--teacher", teacher.folder, "OUTPUT_DIR", tmp_path / "run", processes=2
    ).succeeded()
    assert checkpoint(tmp_path / "run" / "model_final.pth")["balance"]["factors"]["loss_pkd"] != 1

"""A teacher by the folder of its run, or by config and weights."""

from __future__ import annotations

import logging

import pytest

from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.named_teacher import name_teacher, resolve_run_folder
from d2_distill.errors import UserError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("VERSION: 2\n")
    return tmp_path


def named(*words, **keys):
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    for key, value in keys.items():
        cfg.MODEL.DISTILL[key] = value
    name_teacher(cfg, words)
    return cfg.MODEL


def test_a_folder(run):
    (run / "model_final.pth").touch()
    model = named(str(run))
    assert (model.META_ARCHITECTURE, model.DISTILL.STUDENT) == ("Distiller", "GFL")
    assert (model.DISTILL.METHODS, model.DISTILL.BALANCE) == (("auto",), "auto")
    assert model.DISTILL.TEACHER.CONFIG_FILE == str(run / "config.yaml")
    assert model.DISTILL.TEACHER.WEIGHTS == str(run / "model_final.pth")


def test_no_words_change_nothing():
    assert named() == named(*()) and named().META_ARCHITECTURE == "GFL"


def test_config_and_weights_and_choices_of_the_config(run):
    model = named("teacher.yaml", "weights.pth", METHODS=("PKD",), BALANCE="published")
    node = model.DISTILL
    assert (node.TEACHER.CONFIG_FILE, node.TEACHER.WEIGHTS) == ("teacher.yaml", "weights.pth")
    assert (node.METHODS, node.BALANCE) == (("PKD",), "published")
    assert named("zoo/name.yaml").DISTILL.TEACHER.WEIGHTS == ""
    assert named(str(run), "other.pth").DISTILL.TEACHER.WEIGHTS == "other.pth"  # no checkpoint in the folder


def test_a_distiller_keeps_its_student(run):
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILL.STUDENT = "Distiller", "ATSS"
    name_teacher(cfg, ["teacher.yaml"])
    assert cfg.MODEL.DISTILL.STUDENT == "ATSS"


@pytest.mark.parametrize(
    "files, taken",
    [
        (["model_0000099.pth", "model_0000199.pth"], "model_0000199.pth"),
        (["model_0000099.pth", "model_final.pth"], "model_final.pth"),
        (["model_0000099.pth", "model_final.pth", "model_best.pth"], "model_best.pth"),
        (["model_final.pth", "other.pth", "model_x.pth"], "model_final.pth"),
    ],
)
def test_which_checkpoint_is_said(run, files, taken, caplog):
    for name in files:
        (run / name).touch()
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        assert named(str(run)).DISTILL.TEACHER.WEIGHTS == str(run / taken)
    assert (f"taking {taken}" in caplog.text) == (len([n for n in files if n not in ("other.pth", "model_x.pth")]) > 1)


def test_the_same_by_config(run):
    (run / "model_final.pth").touch()
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = str(run)
    resolve_run_folder(cfg)
    assert cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE == str(run / "config.yaml")
    assert cfg.MODEL.DISTILL.TEACHER.WEIGHTS == str(run / "model_final.pth")


def test_bad_folders(tmp_path, run):
    with pytest.raises(UserError, match="--teacher: the folder .* has no checkpoint .* train the teacher first"):
        named(str(run))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--teacher: the folder .* has no config.yaml"):
        named(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="--teacher has 3 values"):
        named("a", "b", "c")

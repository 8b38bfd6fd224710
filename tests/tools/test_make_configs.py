"""make_configs.py: configs that build and train, sizes that fit the objects, and refusals before anything is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from d2_distill.apps.recipe.timing import Seconds
from d2_distill.config.reading import read_config
from d2_distill.detectors.building import build_detector
from d2_distill.evaluation.complexity import count_parameters

from ..data.small_sets import write_coco

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_configs  # noqa: E402

ROLES = ("teacher", "student", "distilled")


@pytest.fixture
def data(tmp_path):
    _, annotations, images = write_coco(tmp_path / tmp_path.name, sizes=[(120, 90)] * 12)
    return ["--train-data", annotations, images, "--test-data", annotations, images]


def make(data, folder, *options):
    make_configs.main([*data, "--output", str(folder), *options])
    return {role: read_config(str(folder / f"{role}.yaml"), ["MODEL.DEVICE", "cpu"], source=role) for role in ROLES}


@pytest.mark.parametrize("head", ["GFL", "RetinaNet", "OpenMMLabFCOS", "ATSS"])
def test_the_configs_build(data, tmp_path, head, capsys):
    cfgs = make(data, tmp_path / "mine", "--from-scratch", "--head", head)
    sizes = {role: count_parameters(build_detector(cfgs[role])) for role in ROLES}
    assert sizes["student"] == sizes["distilled"] < sizes["teacher"]
    distilled = cfgs["distilled"]
    assert distilled.MODEL.DISTILL.STUDENT == head and distilled.MODEL.DISTILL.METHODS == ("auto",)
    assert distilled.MODEL.DISTILL.TEACHER.WEIGHTS == "output/mine/teacher/model_final.pth"
    for cfg in cfgs.values():
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MAX_SIZE_TRAIN)
        # Ten of the twelve images have an object.
        assert cfg.SOLVER.IMS_PER_BATCH == 8 and cfg.SOLVER.MAX_ITER == 80
        assert cfg.TEST.EVAL_PERIOD == 8 and cfg.SOLVER.WARMUP_ITERS == 4
    said = capsys.readouterr().out
    assert "M parameters" in said and "GFLOPs" in said and "anchors of" in said
    assert said.count("python train_net.py --config-file") == 3 and "tools/export.py onnx" in said


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_pretrained_backbones_by_default(data, tmp_path, size):
    cfgs = make(data, tmp_path / "mine", "--size", size)
    for role in ("teacher", "student"):
        assert cfgs[role].MODEL.WEIGHTS.startswith("torchvision://") and cfgs[role].INPUT.FORMAT == "RGB"


def test_every_value_that_was_chosen_has_a_reason(data, tmp_path):
    make(data, tmp_path / "mine", "--from-scratch")
    text = (tmp_path / "mine" / "student.yaml").read_text()
    assert "# 2 classes, which the head takes from the annotations: cat, dog" in text
    assert "64 passes over 10 images: about 40000 images seen from scratch, but 12 to 60 passes" in text
    assert "px reach" in text and "root of batch / 8" in text
    assert yaml.safe_load(text)["MODEL"]["META_ARCHITECTURE"] == "GFL"


def test_a_budget_shortens_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(make_configs, "measure", lambda cfg: Seconds(step=2.0, forward=1.0))
    cfgs = make(data, tmp_path / "mine", "--from-scratch", "--budget", "1.5min")
    assert cfgs["teacher"].SOLVER.MAX_ITER == 40 and cfgs["student"].SOLVER.MAX_ITER == 30
    assert "what fits into 1.5min" in (tmp_path / "mine" / "student.yaml").read_text()


def test_a_step_is_really_measured(data, tmp_path):
    cfgs = make(data, tmp_path / "mine", "--from-scratch", "--budget", "2h")
    assert cfgs["student"].SOLVER.MAX_ITER == 80


def refusal(data, folder, *options):
    """The message, of an end at which no folder is there."""
    with pytest.raises(SystemExit) as end:
        make(data, folder, *options)
    assert not folder.exists()
    return end.value.code


def test_refusals(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_configs, "measure", lambda cfg: Seconds(step=2.0, forward=1.0))
    message = refusal(data, tmp_path / "a", "--from-scratch", "--budget", "5s")
    assert message.startswith("error: --budget of 0.0833 min is too short: a step takes 3.00 s here")
    assert refusal(data, tmp_path / "b", "--budget", "soon") == 2
    assert "'soon' is no time such as 90s, 10min or 1.5h" in capsys.readouterr().err
    assert refusal(data[3:], tmp_path / "c").startswith("error: --train-data is missing")
    annotations = data[1]
    with open(annotations) as file:
        content = json.load(file)
    content["annotations"] = []
    with open(annotations, "w") as file:
        json.dump(content, file)
    assert refusal(data, tmp_path / "d").startswith("error: ")


def test_nothing_is_overwritten_unasked(data, tmp_path):
    folder = tmp_path / "mine"
    make(data, folder, "--from-scratch")
    before = (folder / "student.yaml").read_text()
    with pytest.raises(SystemExit, match="exists; name another path, or add --overwrite"):
        make(data, folder, "--from-scratch", "--head", "ATSS")
    assert (folder / "student.yaml").read_text() == before
    make(data, folder, "--from-scratch", "--head", "ATSS", "--overwrite")
    assert (folder / "student.yaml").read_text() != before

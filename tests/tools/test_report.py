"""tools/report.py on small real runs: real checkpoints, metrics written by Detectron2's own writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter
from PIL import Image

from d2_distill.config import get_distill_cfg
from d2_distill.data.quickstart import prepare
from d2_distill.errors import UserError
from d2_distill.evaluation.complexity import count_flops, count_parameters
from d2_distill.student import build_student

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402

# Meta-architecture and depth of the towers of each run; the student's is the config of a distillation.
MODELS = {"teacher": ("RetinaNet", 2), "student": ("Distiller", 1)}
TINY_RETINANET = {
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "WIDTH_PER_GROUP": 8,
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 8,
            "NORM": "BN",
            "OUT_FEATURES": ["res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 8},
        "RETINANET": {"NUM_CLASSES": 10, "SCORE_THRESH_TEST": 0.0},
        "ANCHOR_GENERATOR": {"SIZES": [[12], [24], [48], [96], [192]]},
    },
    "DATASETS": {
        "COCO": [["report_val", "quickstart/annotations/instances_val.json", "quickstart/val"]],
        "TRAIN": [],
        "TEST": ["report_val"],
    },
    "INPUT": {"MIN_SIZE_TEST": 96},
}


def _write_run(folder: Path, name: str) -> None:
    """What a finished training leaves: config.yaml, metrics.json, model_final.pth."""
    folder.mkdir(parents=True)
    cfg = get_distill_cfg()
    cfg.merge_from_other_cfg(type(cfg)(TINY_RETINANET))
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CONVS = MODELS[name]
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_student(cfg).state_dict()}, folder / "model_final.pth")
    writer = JSONWriter(str(folder / "metrics.json"))
    with EventStorage() as storage:
        for iteration in (9, 19):
            storage.iter = iteration
            storage.put_scalars(total_loss=3.0 - iteration / 10, loss_cls=1.0, loss_box_reg=0.5)
            storage.put_scalar("train_seconds", 50.25 * (iteration + 1), smoothing_hint=False)
            for metric, value in (("AP", 12.34), ("AP50", 40.0), ("AP75", float("nan"))):
                storage.put_scalar(f"bbox/{metric}", value * (iteration + 1) / 20, smoothing_hint=False)
            writer.write()
    writer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    prepare(root / "datasets", train_images=1, val_images=4)
    for name in MODELS:
        _write_run(root / name, name)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DETECTRON2_DATASETS", str(root / "datasets"))
        yield root


def test_command_writes_table_and_pictures(runs, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "report.py"), "--output", str(tmp_path), "--images", "3"]
    command += [f"--run={name}={runs / name}" for name in MODELS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "|" in line]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table[0] == ["model", "parameters", "GFLOPs", "AP", "AP50", "AP75", "training time"]
    assert [row[0] for row in table[2:]] == ["teacher", "student"]
    for row in table[2:]:
        assert row[3:] == ["12.3", "40.0", "nan", "0:16:45"]
    teacher, student = (float(row[2]) for row in table[2:])
    assert teacher > student > 0
    assert (tmp_path / "report.md").read_text().splitlines()[0] in done.stdout
    detections = np.asarray(Image.open(tmp_path / "detections.png").convert("RGB"))
    assert detections.shape[:2] == (930, 900)  # three images; ground truth and two runs
    lime = (detections == (0, 255, 0)).all(axis=2)
    assert lime[:, :300].sum() > 100  # boxes of the ground truth
    assert Image.open(tmp_path / "curves.png").size == (1500, 680)  # AP, total_loss and two terms


def test_table_states_the_model_that_was_saved(runs):
    run = report.load_run("student", runs / "student")
    saved = torch.load(runs / "student" / "model_final.pth", weights_only=True)["model"]
    buffers = {name for name, _ in run.model.named_buffers()}
    assert count_parameters(run.model) == sum(v.numel() for name, v in saved.items() if name not in buffers)
    assert torch.equal(run.model.state_dict()["head.cls_score.weight"], saved["head.cls_score.weight"])
    small = [{"image": torch.zeros(3, 128, 128)}]
    large = [{"image": torch.zeros(3, 256, 128)}]
    assert count_flops(run.model, large) == 2 * count_flops(run.model, small) > 0
    assert not run.model.training


def test_later_value_of_a_repeated_iteration_counts(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        '{"iteration": 19, "total_loss": 1.0}\n'
        '{"iteration": 39, "total_loss": 0.5}\n'
        '{"iteration": 59, "tot\n'
        '{"iteration": 39, "total_loss": 0.25, "bbox/AP": 7.0}\n'
    )
    assert report.read_curves(path) == {"total_loss": {19: 1.0, 39: 0.25}, "bbox/AP": {39: 7.0}}


def test_right_means_class_and_place(runs):
    from detectron2.structures import Boxes, Instances

    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    truth = Instances((40, 40), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([1, 2]))
    places = torch.cat([boxes, boxes + 8])
    found = Instances((40, 40), pred_boxes=Boxes(places), pred_classes=torch.tensor([1, 1, 1, 2]))
    assert report._right(found, truth) == [True, False, False, False]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.json", "model_final.pth"])
def test_unfinished_run_is_named(tmp_path, missing):
    _write_run(tmp_path / "run", "student")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(UserError, match=f"run has no {missing}.*'half' is not finished"):
        report.load_run("half", tmp_path / "run")


def test_weights_of_another_model_are_refused(runs, tmp_path):
    _write_run(tmp_path / "run", "student")
    other = runs / "teacher" / "model_final.pth"
    (tmp_path / "run" / "model_final.pth").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="does not fit the config.yaml.*cls_subnet"):
        report.load_run("student", tmp_path / "run")


def test_run_without_evaluation_is_refused(runs, tmp_path):
    _write_run(tmp_path / "run", "student")
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0}\n')
    with pytest.raises(UserError, match="holds no bbox/AP"):
        report.load_run("student", tmp_path / "run")


def test_runs_on_different_data_are_refused(runs, tmp_path):
    first, second = (report.load_run(name, runs / name) for name in MODELS)
    second.cfg.DATASETS.TEST = ("another",)
    with pytest.raises(UserError, match="different data sets.*another"):
        report.report([first, second], tmp_path, images=1, threshold=0.5)


def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="none has no config.yaml"):
        report.main(["--output", str(tmp_path), "--run", f"a={tmp_path}/none"])
    with pytest.raises(SystemExit, match="2"):
        report.main(["--output", str(tmp_path), "--run", "output"])
    assert "'output' is not NAME=FOLDER" in capsys.readouterr().err

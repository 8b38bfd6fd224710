"""The config.yaml of a distilled run in Python: Detectron2's DefaultPredictor and DefaultTrainer, and our Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detectron2.engine
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from PIL import Image

import d2_distill
from d2_distill import UserError, provider
from d2_distill.apps.inference.predictor import Predictor
from d2_distill.engine import Trainer

from .runs import checkpoint, run_program, scalars

needs_detectron2 = pytest.mark.skipif(
    provider.name() == "embedded",
    reason="the embedded Detectron2 has no DefaultPredictor, and leaves DefaultTrainer's constructor to subclasses",
)
IN_EVALUATION = """
import sys
import torch
import d2_distill
from detectron2.config import get_cfg
from detectron2.modeling import build_model

cfg = get_cfg()
d2_distill.add_distill_config(cfg)
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg)
assert len(model.eval()([{"image": torch.zeros(3, 40, 48)}])) == 1 and model.teacher is None
"""


def config_of(run, *opts: Any) -> CfgNode:
    """As a user of Detectron2 reads it."""
    cfg = get_cfg()
    d2_distill.add_distill_config(cfg)
    cfg.merge_from_file(str(run.folder / "config.yaml"))
    cfg.merge_from_list(list(opts))
    return cfg


def training(run, folder: Path, *opts: Any) -> CfgNode:
    """The same for two iterations in a folder, without evaluation; its data sets are registered."""
    cfg = config_of(run, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", str(folder), *opts)
    d2_distill.register_datasets(cfg)
    return cfg


def test_a_fresh_interpreter_builds_the_student(distilled, tmp_path):
    config = tmp_path / "config.yaml"
    cfg = config_of(distilled, "MODEL.DISTILL.TEACHER.CONFIG_FILE", str(tmp_path / "missing.yaml"))
    config.write_text(cfg.dump())
    run_program("-c", IN_EVALUATION, config, cwd=tmp_path).succeeded()


@needs_detectron2
def test_default_predictor_runs_the_student_alone(distilled, data):
    _, _, folder = data["DATASETS"]["COCO"][1]
    picture = np.array(Image.open(min(Path(folder).glob("*.png"))).convert("RGB"))
    missing = ("MODEL.DISTILL.TEACHER.CONFIG_FILE", "missing.yaml")
    cfg = config_of(distilled, "MODEL.WEIGHTS", str(distilled.weights), *missing)
    expected = Predictor.from_config(cfg)(picture)
    predictor = detectron2.engine.DefaultPredictor(cfg)
    found = predictor(picture[:, :, ::-1])["instances"]
    assert predictor.model.teacher is None and len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@needs_detectron2
def test_default_trainer_distils_and_resumes(distilled, plain, tmp_path):
    methods = ("MODEL.DISTILL.METHODS", ("CrossKD", "PKD"))
    cfg = training(distilled, tmp_path, *methods, "MODEL.WEIGHTS", str(plain.weights))
    trainer = detectron2.engine.DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = checkpoint(plain.weights)["model"]
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())
    trainer.train()
    assert scalars(tmp_path)["loss_pkd"] > 0 and scalars(tmp_path)["loss_crosskd_cls"] > 0
    saved = checkpoint(tmp_path / "model_final.pth")
    assert "distill" not in saved and list(saved["model"]) == list(start)
    assert not torch.equal(saved["model"]["head.cls_score.weight"], start["head.cls_score.weight"])
    again = detectron2.engine.DefaultTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    assert all(torch.equal(value, saved["model"][name]) for name, value in again.model.state_dict().items())


@needs_detectron2
def test_default_trainer_refuses_layers_that_it_would_not_train(distilled, tmp_path):
    trainer = detectron2.engine.DefaultTrainer(training(distilled, tmp_path))
    with pytest.raises(UserError, match="FeatureImitation trains layers of its own.*d2_distill.engine.Trainer"):
        trainer.train()


def test_own_trainer_takes_what_build_model_gives(distilled, tmp_path):
    cfg = training(distilled, tmp_path)
    model = build_model(cfg)
    trainer = Trainer(cfg, model)
    trainer.resume_or_load(resume=False)
    assert set(map(id, model.parameters())) == {id(p) for x in trainer.optimizer.param_groups for p in x["params"]}
    trainer.train()
    saved = checkpoint(tmp_path / "model_final.pth")
    assert saved["distill"].keys() == model.methods.state_dict().keys() != set()
    assert list(saved["model"]) == list(model.state_dict()) == list(checkpoint(distilled.weights)["model"])

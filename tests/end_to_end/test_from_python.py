"""The config.yaml of a distilled run in Detectron2's own classes: the student predicts, and training distils or refuses."""

from __future__ import annotations

import detectron2.engine
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

import d2_distill
from d2_distill import UserError, provider
from d2_distill.apps.inference.predictor import Predictor

from ..same_detections import assert_same_detections
from .runs import checkpoint, scalars

needs_detectron2 = pytest.mark.skipif(
    provider.name() == "embedded",
    reason="the embedded Detectron2 has no DefaultPredictor, and leaves the constructor of DefaultTrainer to subclasses",
)


def config_of(run, **values):
    """As a user of Detectron2 reads it."""
    cfg = get_cfg()
    d2_distill.add_distill_config(cfg)
    cfg.merge_from_file(str(run.folder / "config.yaml"))
    cfg.merge_from_list([item for key, value in values.items() for item in (key.replace("__", "."), value)])
    return cfg


@pytest.fixture
def picture(data):
    _, _, folder = data["DATASETS"]["COCO"][1]
    from pathlib import Path

    return np.array(Image.open(sorted(Path(folder).glob("*.png"))[0]).convert("RGB"))


@needs_detectron2
def test_default_predictor_runs_the_student_alone(distilled, picture):
    weights = {"MODEL__WEIGHTS": str(distilled.weights), "MODEL__DISTILL__TEACHER__CONFIG_FILE": "missing.yaml"}
    cfg = config_of(distilled, **weights)
    expected = Predictor.from_config(cfg)(picture)
    found = detectron2.engine.DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]
    assert_same_detections(found, expected)


@needs_detectron2
def test_default_trainer_distils(distilled, plain, tmp_path):
    values = {"MODEL__DISTILL__METHODS": ("CrossKD", "PKD"), "SOLVER__MAX_ITER": 2, "OUTPUT_DIR": str(tmp_path)}
    values["MODEL__WEIGHTS"] = str(plain.weights)
    cfg = config_of(distilled, DATASETS__TEST=(), **values)
    d2_distill.register_datasets(cfg)
    trainer = detectron2.engine.DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = checkpoint(plain.weights)["model"]
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.state_dict().items())
    trainer.train()
    assert scalars(tmp_path)["loss_pkd"] > 0 and scalars(tmp_path)["loss_crosskd_cls"] > 0
    saved = checkpoint(tmp_path / "model_final.pth")
    assert "distill" not in saved and list(saved["model"]) == list(start)
    again = detectron2.engine.DefaultTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in saved["model"].items())


@needs_detectron2
def test_default_trainer_refuses_what_it_would_not_train(distilled, tmp_path):
    cfg = config_of(distilled, DATASETS__TEST=(), SOLVER__MAX_ITER=1, OUTPUT_DIR=str(tmp_path))
    d2_distill.register_datasets(cfg)
    trainer = detectron2.engine.DefaultTrainer(cfg)
    with pytest.raises(UserError, match="FeatureImitation trains layers of its own.*d2_distill.engine.Trainer"):
        trainer.train()

"""Predictor: what it finds is what an evaluation finds, in the pixels and channel order of the given picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from PIL import Image

from d2_distill.apps.inference.predictor import Predictor
from d2_distill.data.mapper import CheckedDatasetMapper
from d2_distill.errors import UserError

from ..small_detectors import build, detector_cfg, distiller_cfg, save_teacher


def small(cfg):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    return cfg


def saved(folder, cfg):
    DetectionCheckpointer(build(cfg, salt=2), str(folder)).save("model")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    return cfg


@pytest.mark.parametrize("case, input_format", [("RetinaNet", "BGR"), ("GFL", "RGB"), ("GeneralizedRCNN", "BGR")])
def test_equals_an_evaluation(tmp_path, case, input_format):
    """A file with an orientation tag goes through the mapper and the model."""
    cfg = small(detector_cfg(case))
    cfg.INPUT.FORMAT = input_format
    cfg = saved(tmp_path, cfg)
    pixels = np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    record = {"file_name": str(tmp_path / "turned.png"), "height": 56, "width": 40}

    predictor = Predictor.from_config(cfg)
    with torch.no_grad():
        [expected] = predictor.model([CheckedDatasetMapper(cfg, is_train=False)(record)])
    found = predictor(np.rot90(pixels, k=-1))
    assert found.image_size == (56, 40) and len(found) > 3
    torch.testing.assert_close(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
    for name in ("scores", "pred_classes"):
        torch.testing.assert_close(getattr(found, name), getattr(expected["instances"], name))


def test_a_distillation_gives_its_student_without_building_a_teacher(tmp_path):
    teacher = save_teacher(tmp_path, "RetinaNet")
    cfg = saved(tmp_path, small(distiller_cfg("RetinaNet", teacher, ["PKD"])))
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = "nowhere.pth"
    predictor = Predictor.from_config(cfg)
    assert type(predictor.model).__name__ == "RetinaNet" and not predictor.model.training


def test_class_names_are_those_of_the_config(tmp_path):
    cfg = saved(tmp_path, small(detector_cfg("RetinaNet")))
    assert Predictor.from_config(cfg).class_names == []
    cfg.DATASETS.CLASSES = ("cat", "dog", "cow")
    assert Predictor.from_config(cfg).class_names == ["cat", "dog", "cow"]


def test_what_cannot_be_used_is_refused(tmp_path):
    cfg = small(detector_cfg("RetinaNet"))
    with pytest.raises(UserError, match="^TEACHER.WEIGHTS is empty"):
        Predictor.from_config(cfg, weights_key="TEACHER.WEIGHTS")
    cfg = saved(tmp_path, cfg)
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(UserError, match="INPUT.FORMAT is 'L'"):
        Predictor.from_config(cfg)

"""Test-time augmentation: several copies of an image, one set of boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from d2_distill.data.registration import register_datasets
from d2_distill.engine import Trainer
from d2_distill.errors import UserError
from d2_distill.evaluation.augmented import AugmentedDetector, AugmentedMapper, check_augmentation

from ..data.small_sets import small_cfg, write_coco

SIZE = (60, 40)  # width, height of the picture
SQUARE = torch.tensor([[6.0, 8.0, 18.0, 20.0]])  # where it is white


def augmented_cfg(**keys):
    cfg = small_cfg(TEST__AUG__ENABLED=True, **keys)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (40, 80, 60), 200
    return cfg


class FindsWhite(nn.Module):
    """Finds the white square of an image, and reports what it has seen."""

    test_nms_thresh = 0.6

    def __init__(self):
        super().__init__()
        self.sizes, self.scores = [], iter(torch.linspace(0.5, 0.9, 50))

    def forward(self, batched_inputs):
        [inputs] = batched_inputs
        image = inputs["image"]
        self.sizes.append(tuple(image.shape[1:]))
        rows, columns = (image[0] > 127).any(1).nonzero(), (image[0] > 127).any(0).nonzero()
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        box *= torch.tensor([inputs["width"] / image.shape[2], inputs["height"] / image.shape[1]] * 2)
        found = Instances((inputs["height"], inputs["width"]), pred_boxes=Boxes(box[None]))
        found.scores, found.pred_classes = next(self.scores)[None], torch.zeros(1, dtype=torch.long)
        return [{"instances": found}]


@pytest.fixture
def record(tmp_path):
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[8:20, 6:18] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "width": SIZE[0], "height": SIZE[1], "image_id": 1}


def test_boxes_of_all_copies_agree_and_are_merged(record):
    model = FindsWhite().eval()
    inputs = AugmentedMapper(augmented_cfg())(record)
    detector = AugmentedDetector(model, max_detections=100)
    [output] = detector([inputs])
    assert model.sizes == [(40, 60)] * 2 + [(80, 120)] * 2 + [(60, 90)] * 2
    found = output["instances"]
    assert len(found) == 1 and found.image_size == SIZE[::-1] and not detector.training
    assert (found.pred_boxes.tensor - SQUARE).abs().max() < 1
    assert found.scores.item() == pytest.approx(torch.linspace(0.5, 0.9, 50)[5].item())  # the surest of the six


def test_without_flip_and_with_few_detections(record):
    cfg = augmented_cfg(TEST__AUG__FLIP=False)
    model = FindsWhite().eval()
    detector = AugmentedDetector(model, max_detections=2)
    detector.iou_threshold = 1.0  # nothing is suppressed
    [output] = detector([AugmentedMapper(cfg)(record)])
    assert len(model.sizes) == 3 and len(output["instances"]) == 2
    scores = output["instances"].scores
    assert scores[0] > scores[1] > 0.5
    assert AugmentedDetector(nn.Identity(), max_detections=2).iou_threshold == 0.5


@pytest.mark.parametrize("key, value, sentence", [
    ("TEST.AUG.MIN_SIZES", (), r"TEST.AUG.MIN_SIZES is \(\)"),
    ("TEST.AUG.MIN_SIZES", (40, 0), "TEST.AUG.MIN_SIZES is"),
    ("TEST.AUG.MAX_SIZE", 0, "TEST.AUG.MAX_SIZE is 0"),
    ("MODEL.MASK_ON", True, "MODEL.MASK_ON is True; set one of them"),
    ("MODEL.KEYPOINT_ON", True, "MODEL.KEYPOINT_ON is True"),
])
def test_what_cannot_be_done(key, value, sentence):
    cfg = augmented_cfg()
    check_augmentation(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=sentence):
        check_augmentation(cfg)
    cfg.TEST.AUG.ENABLED = False
    check_augmentation(cfg)


def test_results_have_a_name_of_their_own(tmp_path):
    def edit(content):
        content["annotations"][0].update(bbox=[6, 8, 12, 12], area=144)

    row = write_coco(tmp_path, sizes=(SIZE,), edit=edit)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[8:20, 6:18] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    cfg = augmented_cfg(DATASETS__COCO=(row,), DATASETS__TEST=(row[0],), OUTPUT_DIR=str(tmp_path / "out"))
    register_datasets(cfg)
    model = FindsWhite()
    results = Trainer.test_augmented(cfg, model)
    assert list(results) == ["bbox_TTA"] and results["bbox_TTA"]["AP50"] == pytest.approx(100)
    assert model.training and (tmp_path / "out" / "inference_TTA" / "coco_instances_results.json").exists()
    cfg.TEST.AUG.ENABLED = False
    assert Trainer.test_augmented(cfg, model) == {}

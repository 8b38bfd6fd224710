"""Evaluators and the inference loop, as far as no recording covers them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    verify_results,
)

from d2_distill import provider

from .detection_data import outputs_of, registered, write_voc

NAME = "embedded_test_evaluation"
CATEGORY_IDS = (2, 5, 9)
embedded_only = pytest.mark.skipif(provider.name() == "real", reason="the real Detectron2 has this feature")


def _evaluate(evaluator, detections):
    evaluator.reset()
    for given, output in outputs_of(detections):
        evaluator.process([given], [output])
    return evaluator.evaluate()


def _random_coco(path):
    """Annotations (crowds among them) of 20 images; detections near them and elsewhere, with equal scores."""
    rng = np.random.RandomState(1)
    annotations, detections = [], []
    for image_id in range(1, 21):
        for _ in range(rng.randint(0, 12)):
            x, y, w, h = (rng.rand(4) * [120, 120, 110, 110]).tolist()
            k = int(rng.randint(0, 3))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[k],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.rand() < 0.1),
                }
            )
            for _ in range(rng.randint(0, 4)):
                box = np.array([x, y, x + w, y + h]) + 4 * rng.randn(4)
                box[2:] = np.maximum(box[2:], box[:2] + 1)
                found_class = k if rng.rand() < 0.9 else 0
                detections.append((image_id, box.tolist(), round(rng.rand(), 2), found_class))
        for _ in range(15):
            x, y, w, h = (rng.rand(4) * [120, 120, 80, 80]).tolist()
            score = round(0.5 * rng.rand(), 2)
            detections.append((image_id, [x, y, x + w, y + h], score, int(rng.randint(0, 3))))
    images = [{"id": i, "file_name": f"{i}.png", "height": 200, "width": 200} for i in range(1, 21)]
    categories = [{"id": i, "name": f"n{i}"} for i in CATEGORY_IDS]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return detections


@embedded_only
def test_both_coco_implementations_agree(tmp_path, monkeypatch):
    pytest.importorskip("faster_coco_eval")
    detections = _random_coco(tmp_path / "a.json")
    with registered(NAME, register_coco_instances, {}, str(tmp_path / "a.json"), ""):
        DatasetCatalog.get(NAME)  # sets the class names and the mapping of ids
        evaluator = COCOEvaluator(NAME)
        assert evaluator._eval_class().__name__ == "COCOeval_faster"
        fast = _evaluate(evaluator, detections)["bbox"]
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as if it were not installed
        assert evaluator._eval_class().__name__ == "COCOeval"
        slow = _evaluate(evaluator, detections)["bbox"]
    assert set(slow) == {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-n2", "AP-n5", "AP-n9"}
    assert 5 < slow["AP"] < 50
    assert fast == pytest.approx(slow, rel=1e-12, nan_ok=True)


def _one_box_file(path, annotated=True):
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "q.png", "height": 5, "width": 5}],
        "categories": [{"id": 1, "name": "u"}],
    }
    if annotated:
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
        content["annotations"] = [box]
    path.write_text(json.dumps(content))
    return str(path)


def test_one_class_has_no_entry_of_its_own(tmp_path):
    with registered(NAME, register_coco_instances, {}, _one_box_file(tmp_path / "a.json"), ""):
        DatasetCatalog.get(NAME)
        results = _evaluate(COCOEvaluator(NAME), [(1, [0.0, 0.0, 4.0, 4.0], 0.5, 0)])
    assert list(results["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert results["bbox"]["APs"] == pytest.approx(100.0)


def test_unknown_class_of_a_prediction(tmp_path):
    with registered(NAME, register_coco_instances, {}, _one_box_file(tmp_path / "a.json"), ""):
        DatasetCatalog.get(NAME)
        with pytest.raises(AssertionError):
            _evaluate(COCOEvaluator(NAME), [(1, [0.0, 0.0, 4.0, 4.0], 0.5, 1)])


def test_without_annotations_predictions_are_only_written(tmp_path):
    json_file = _one_box_file(tmp_path / "a.json", annotated=False)
    with registered(NAME, register_coco_instances, {}, json_file, ""):
        DatasetCatalog.get(NAME)
        evaluator = COCOEvaluator(NAME, output_dir=str(tmp_path / "out"))
        assert _evaluate(evaluator, [(1, [0.0, 0.0, 4.0, 4.0], 0.5, 0)]) == {}
    assert len(json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())) == 1


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc_rules(tmp_path, year):
    boxes = {"easy": [11, 21, 30, 40], "second": [51, 51, 90, 90], "hard": [1, 61, 30, 90]}
    objects = [("000001", "cat", box, name == "hard") for name, box in boxes.items()]
    write_voc(tmp_path / "voc", "val", ["000001"], (100, 100), objects)

    def detection(name, score):
        x0, y0, x1, y1 = boxes[name]
        return ("000001", [x0 - 1.0, y0 - 1.0, float(x1), float(y1)], score, 0)

    def ap50(*detections):
        with registered(NAME, register_pascal_voc, str(tmp_path / "voc"), "val", year, ["cat"]):
            return _evaluate(PascalVOCDetectionEvaluator(NAME), detections)["bbox"]["AP50"]

    easy, second, hard = detection("easy", 0.9), detection("second", 0.5), detection("hard", 0.8)
    assert ap50(easy, second) == pytest.approx(100.0)
    assert ap50(easy, hard, second) == pytest.approx(100.0)  # difficult: counts neither way
    # a second detection of the same object is false: precision 1 up to recall 1/2, then 2/3
    duplicate = detection("easy", 0.7)
    expected = (6 * 1 + 5 * 2 / 3) / 11 if year == 2007 else (1 + 2 / 3) / 2
    assert ap50(easy, duplicate, second) == pytest.approx(100 * expected)
    assert ap50(easy) == pytest.approx(100 * 6 / 11 if year == 2007 else 50.0)


# the loop


class _Sum(DatasetEvaluator):
    """Sums the model's outputs under a name, or has no result."""

    def __init__(self, name):
        self.name = name

    def reset(self):
        self.total = 0

    def process(self, inputs, outputs):
        self.total += sum(outputs)

    def evaluate(self):
        return {self.name: self.total} if self.name else None


class _Model(torch.nn.Module):
    def forward(self, inputs):
        assert not self.training and not torch.is_grad_enabled()
        return inputs


LOADER = [[i] for i in range(12)]


@pytest.mark.parametrize("training", [True, False])
def test_inference_restores_the_mode(training):
    model = _Model().train(training)
    assert inference_on_dataset(model, LOADER, _Sum("sum")) == {"sum": 66}
    assert inference_on_dataset(model, LOADER, _Sum(None)) == {}
    assert model.training is training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "actual, fine", [(10.0, True), (10.5, True), (8.9, False), (11.5, False), (float("nan"), False)]
)
def test_verify_results(actual, fine):
    cfg = get_cfg()
    assert verify_results(cfg, {}) is True
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 10.0, 1.0]]
    if fine:
        assert verify_results(cfg, {"bbox": {"AP": actual}}) is True
        return
    with pytest.raises(SystemExit) as exit_:
        verify_results(cfg, {"bbox": {"AP": actual}})
    assert exit_.value.code == 1


# several processes


def _evaluate_in_process(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    detections = _random_coco(folder / f"copy{rank}.json")
    register_coco_instances(NAME, {}, str(folder / f"copy{rank}.json"), "")
    DatasetCatalog.get(NAME)
    own = [row for row in detections if row[0] % 2 == rank]
    results[rank] = dict(_evaluate(COCOEvaluator(NAME), own).get("bbox", {}))
    torch.distributed.destroy_process_group()


def test_predictions_of_all_processes_are_gathered(tmp_path):
    detections = _random_coco(tmp_path / "a.json")
    with registered(NAME, register_coco_instances, {}, str(tmp_path / "a.json"), ""):
        DatasetCatalog.get(NAME)
        alone = _evaluate(COCOEvaluator(NAME), detections)["bbox"]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_evaluate_in_process, args=(tmp_path, results), nprocs=2)
        together = dict(results)
    assert together[1] == {}
    assert together[0] == pytest.approx(alone, rel=1e-12, nan_ok=True)

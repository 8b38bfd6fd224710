"""COCO's evaluation needs no file again whose content was kept."""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from d2_distill.data.registration import register_datasets
from d2_distill.engine import Trainer
from d2_distill.evaluation.coco import CheckedCOCOEvaluator

from ..data.small_sets import WIDE, small_cfg, write_coco


@pytest.fixture
def row(tmp_path):
    def edit(content):
        content["annotations"][2]["iscrowd"] = 1
        content["annotations"][0].update(area=20, segmentation=[[2, 3, 10, 3, 10, 9]])

    row = write_coco(tmp_path, sizes=(WIDE,) * 6, edit=edit)
    register_datasets(small_cfg(DATASETS__COCO=(row,), DATASETS__TEST=(row[0],)))
    return row


def detect_in(evaluator, name):
    """Give the evaluator, for each object, a box that is a little too wide, and one of the wrong class."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((record["height"], record["width"]))
        boxes = [[x, y, x + width + 1, y + height] for x, y, width, height in (row["bbox"] for row in record["annotations"])]
        classes = [row["category_id"] for row in record["annotations"]]
        found.pred_boxes = Boxes(torch.tensor(boxes * 2, dtype=torch.float).reshape(-1, 4))
        found.pred_classes = torch.tensor([*classes, *(1 - number for number in classes)], dtype=torch.long)
        found.scores = torch.linspace(0.9, 0.5, 2 * len(boxes))
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()


def test_result_is_that_of_the_file(row, tmp_path):
    expected = detect_in(COCOEvaluator(row[0], output_dir=str(tmp_path / "theirs")), row[0])
    (tmp_path / "set.json").unlink()
    found = detect_in(CheckedCOCOEvaluator(row[0], output_dir=str(tmp_path / "ours")), row[0])
    assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True) and 30 < found["bbox"]["AP"] < 100
    with pytest.raises(FileNotFoundError):
        COCOEvaluator(row[0], output_dir=str(tmp_path / "theirs"))


def test_file_is_read_where_its_content_was_not_kept(row, tmp_path):
    """As that of a data set that Detectron2 has registered."""
    DatasetCatalog[row[0]].truth = None
    found = detect_in(CheckedCOCOEvaluator(row[0], output_dir=str(tmp_path / "ours")), row[0])
    assert 30 < found["bbox"]["AP"] < 100
    (tmp_path / "set.json").unlink()
    with pytest.raises(FileNotFoundError):
        CheckedCOCOEvaluator(row[0], output_dir=str(tmp_path / "ours"))


def test_other_processes_only_collect(row, tmp_path, monkeypatch):
    (tmp_path / "set.json").unlink()
    DatasetCatalog[row[0]].truth = None
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    evaluator = CheckedCOCOEvaluator(row[0], output_dir=str(tmp_path / "ours"))
    evaluator.reset()
    found = Instances((20, 30), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0), pred_classes=torch.zeros(0))
    evaluator.process([{"image_id": 100}], [{"instances": found}])


def grid_of_boxes(count):
    return [[8 * (index % 20), 8 * (index // 20), 6, 6] for index in range(count)]


def crowded(tmp_path, count=150):
    """A data set of one image with many objects."""
    def edit(content):
        content["annotations"] = [
            {**content["annotations"][0], "id": 1 + index, "bbox": box, "area": 36}
            for index, box in enumerate(grid_of_boxes(count))
        ]

    row = write_coco(tmp_path, sizes=((160, 160),), edit=edit)
    register_datasets(small_cfg(DATASETS__COCO=(row,), DATASETS__TEST=(row[0],)))
    return row[0]


def perfect_detections(name, **arguments):
    evaluator = CheckedCOCOEvaluator(name, **arguments)
    evaluator.reset()
    process_perfect(evaluator, name)
    return evaluator.evaluate()["bbox"]


def process_perfect(evaluator, name):
    """Give the evaluator the objects of the only image."""
    [record] = DatasetCatalog.get(name)
    boxes = torch.tensor([row["bbox"] for row in record["annotations"]], dtype=torch.float)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((160, 160), pred_boxes=Boxes(boxes), scores=torch.linspace(0.9, 0.5, len(boxes)))
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    evaluator.process([record], [{"instances": found}])


def test_all_detections_that_a_detector_may_return_count(tmp_path):
    name = crowded(tmp_path)
    capped = perfect_detections(name)["AP"]
    assert 60 < capped < 70
    assert perfect_detections(name, max_detections=50)["AP"] == perfect_detections(name, max_detections=100)["AP"] == capped
    for limit in (150, 300, -1):
        metrics = perfect_detections(name, max_detections=limit)
        assert metrics["AP"] == metrics["AP50"] == metrics["APs"] == metrics["AP-cat"] == pytest.approx(100)
    assert list(metrics) == list(perfect_detections(name))


def test_runs_are_evaluated_with_the_detections_that_they_keep(tmp_path):
    name = crowded(tmp_path, count=120)
    for limit, expected in ((100, 82.5), (130, 100)):
        cfg = small_cfg(TEST__DETECTIONS_PER_IMAGE=limit, OUTPUT_DIR=str(tmp_path / "out"))
        evaluator = Trainer.build_evaluator(cfg, name)
        evaluator.reset()
        process_perfect(evaluator, name)
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(expected, abs=2)


def test_ids_of_annotations_do_not_matter(tmp_path):
    """COCO's evaluation takes a match with the id 0 for none, and cannot store a text."""
    results = []
    for number, ids in enumerate(((1, 2, 3), (0, 1, 2), ("a", "b", "c"), (-5, 2**60, 7))):
        def edit(content, ids=ids):
            for row, id_ in zip(content["annotations"], ids):
                row["id"] = id_

        row = write_coco(tmp_path / str(number), name=f"set_{tmp_path.name}", edit=edit)
        register_datasets(small_cfg(DATASETS__COCO=(row,), DATASETS__TEST=(row[0],)))
        results.append(detect_in(CheckedCOCOEvaluator(row[0]), row[0])["bbox"])
    assert all(each == pytest.approx(results[0], nan_ok=True) for each in results) and results[0]["AP"] > 30

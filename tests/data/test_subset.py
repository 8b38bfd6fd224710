"""A part of a data set that evaluators take for all of it."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_distill.apps.pictures import ground_truth
from d2_distill.data.registration import register_datasets
from d2_distill.data.subset import evenly_spread, spread_subset
from d2_distill.engine.trainer import Trainer

from .small_sets import WIDE, small_cfg, write_coco, write_voc


def test_evenly_spread():
    assert evenly_spread(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spread(range(3), 4) == [0, 1, 2] and evenly_spread([], 4) == []


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_evaluators_know_the_part_only(tmp_path, kind):
    if kind == "coco":
        row = write_coco(tmp_path, [WIDE] * 8, edit=without_area)
    else:
        row = write_voc(tmp_path, [[("cat", 3, 4, 10, 9)]] * 8)
    cfg = small_cfg(**{f"DATASETS__{kind.upper()}": (row,), "OUTPUT_DIR": str(tmp_path / "out")})
    register_datasets(cfg)
    whole = DatasetCatalog.get(row[0])
    with spread_subset(row[0], 3) as name:
        records = DatasetCatalog.get(name)
        assert [record["file_name"] for record in records] == [whole[i]["file_name"] for i in (0, 2, 5)]
        assert MetadataCatalog.get(name).thing_classes == MetadataCatalog.get(row[0]).thing_classes
        evaluator = Trainer.build_evaluator(cfg, name)
        loader = Trainer.build_test_loader(cfg, name)
        evaluator.reset()
        for inputs in loader:
            evaluator.process(inputs, [{"instances": perfect(records, inputs[0])}])
        assert evaluator.evaluate()["bbox"]["AP-cat"] == pytest.approx(100)
    assert name not in DatasetCatalog.list() and name not in MetadataCatalog.list()
    with spread_subset(row[0], 100) as name:
        assert len(DatasetCatalog.get(name)) == 8


def without_area(content):
    """As a file to train on may be."""
    for row in content["annotations"]:
        del row["area"], row["iscrowd"]


def perfect(records, given):
    truth = ground_truth(next(record for record in records if record["image_id"] == given["image_id"]))
    truth.pred_boxes, truth.pred_classes = truth.gt_boxes, truth.gt_classes
    truth.scores = truth.gt_classes * 0.0 + 1.0
    return truth

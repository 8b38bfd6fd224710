"""Records of COCO files are those that Detectron2 reads."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from d2_distill import provider
from d2_distill.data import problems
from d2_distill.data.coco_files import read_coco
from d2_distill.data.registration import register_datasets

from .small_sets import TALL, WIDE, small_cfg, write_coco

TRIANGLE = [2, 3, 10, 3, 10, 9]
RUNS = {"size": [20, 30], "counts": [43, 6, 14, 6, 531]}


def shuffle(content):
    """Ids out of order, a crowd, and masks of all kinds, one of them none."""
    content["images"].reverse()
    content["categories"].reverse()
    content["images"][0].update(width=30.0)
    first = dict(content["annotations"][0])
    content["annotations"] += [
        {**first, "id": 50, "segmentation": [TRIANGLE, [1, 2, 3, 4]]},
        {**first, "id": 51, "segmentation": [[1, 2, 3, 4]]},
        {**first, "id": 52, "segmentation": RUNS, "iscrowd": 1},
        {**first, "id": 53, "segmentation": []},
    ]
    content["annotations"].reverse()


@pytest.fixture
def shuffled(tmp_path):
    return write_coco(tmp_path, sizes=(WIDE, TALL, WIDE, WIDE, TALL, WIDE), edit=shuffle)


def without_ids(records):
    return [
        {**record, "annotations": [{k: v for k, v in row.items() if k != "id"} for row in record["annotations"]]}
        for record in records
    ]


@pytest.mark.parametrize("with_masks", [False, True])
def test_records_are_those_of_detectron2(shuffled, with_masks):
    name, json_file, images = shuffled
    found = []
    content = read_coco(json_file, images, found.append, evaluated=True, with_masks=with_masks)
    metadata = MetadataCatalog.get(f"{name}_of_detectron2")
    theirs = load_coco_json(json_file, images, metadata.name)
    assert content.class_names == metadata.thing_classes == ["cat", "dog"]
    # The embedded Detectron2 has no masks.
    with_theirs = with_masks and provider.name() == "real"
    fields = {"bbox", "bbox_mode", "category_id", "iscrowd", *["segmentation"] * with_theirs}
    ours = without_ids(content.records)
    if with_masks and not with_theirs:
        masks = [row.pop("segmentation", None) for row in ours[0]["annotations"]]
        assert masks[2] == [TRIANGLE] and masks[1]["size"] == [20, 30] and masks[0] is masks[3] is None
    for record in theirs:
        record["annotations"] = [{k: v for k, v in row.items() if k in fields} for row in record["annotations"]]
    assert ours == theirs and len(ours[0]["annotations"]) == 4
    assert [problem.kind for problem in found] == [problems.NO_POLYGON] and "annotation 51 has no poly" in found[0].sentence


def test_annotation_without_a_polygon_is_logged_in_training(shuffled, caplog):
    register_datasets(small_cfg(DATASETS__COCO=(shuffled,)))
    assert f"DATASETS.COCO (data set '{shuffled[0]}'): 1 annotations whose polygons" in caplog.text
    assert len(DatasetCatalog.get(shuffled[0])[0]["annotations"]) == 4


def test_masks_are_kept_for_detectors_that_predict_them(shuffled):
    register_datasets(small_cfg(DATASETS__COCO=(shuffled,), MODEL__MASK_ON=True))
    assert sum("segmentation" in row for row in DatasetCatalog.get(shuffled[0])[0]["annotations"]) == 2

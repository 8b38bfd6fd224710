"""Checks of the recordings about COCO and VOC evaluation and the printing of results."""

from __future__ import annotations

import json
import logging

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import (
    load_coco_json,
    load_voc_instances,
    register_coco_instances,
    register_pascal_voc,
)
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict

from ...embedded.detection_data import empty_output, outputs_of, registered, write_voc

LEFT_OUT = {
    "coco_eval: segmentation of loaded crowds": "not recorded; the embedded subset reads no masks",
    "coco_eval: fastFalse_*, *_maxdets<number>": "the project leaves these arguments at their defaults",
}
DATASET = "golden_recording"


def _assert_results(actual, recorded):
    assert set(actual) == set(recorded)
    for task, metrics in recorded.items():
        assert list(actual[task]) == list(metrics)
        for metric, value in metrics.items():
            assert actual[task][metric] == pytest.approx(float(value), rel=1e-6, nan_ok=True), metric


def check_coco_eval(data, arrays, name, tmp_path):
    json_file = str(tmp_path / "annotations.json")
    with open(json_file, "w") as f:
        json.dump(data["annotations"], f)
    with registered(DATASET, register_coco_instances, {}, json_file, ""):
        dicts = load_coco_json(json_file, "", DATASET)
        for record in dicts:
            for annotation in record["annotations"]:
                annotation.pop("segmentation", None)
        assert dicts == data["loaded_dataset_dicts"]
        metadata = MetadataCatalog.get(DATASET)
        assert metadata.thing_classes == data["thing_classes"]
        assert {str(k): v for k, v in metadata.thing_dataset_id_to_contiguous_id.items()} == data["id_map"]

        folder = tmp_path / "inference"
        evaluator = COCOEvaluator(DATASET, output_dir=str(folder))
        evaluator.reset()
        for given, output in outputs_of(data["detections"]):
            evaluator.process([given], [output])
        _assert_results(evaluator.evaluate(), data["results"]["fastTrue_maxdetsNone"])
        assert sorted(p.name for p in folder.iterdir()) == data["files_written"]
        written = json.loads((folder / "coco_instances_results.json").read_text())
        assert len(written) == len(data["detections"])
        for actual, first in zip(written, data["first_two_result_json_entries"]):
            assert actual.keys() == first.keys()
            assert actual["bbox"] == pytest.approx(first["bbox"], rel=1e-8)
            assert actual["score"] == pytest.approx(first["score"], rel=1e-8)
            assert actual["image_id"] == first["image_id"]
            assert actual["category_id"] == first["category_id"]

        evaluator.reset()
        assert evaluator.evaluate() == data["no_process_call"]
        for image in data["annotations"]["images"]:
            evaluator.process([{"image_id": image["id"]}], [empty_output()])
        _assert_results(evaluator.evaluate(), data["only_empty_predictions"])


def check_voc_eval(data, arrays, name, tmp_path):
    folder = tmp_path / "voc"
    write_voc(folder, "test", data["image_ids"], data["image_size_hw"], data["gt"])
    class_names = data["class_names"]
    dicts = load_voc_instances(str(folder), "test", class_names)
    for record in dicts:
        record["file_name"] = record["file_name"][len(str(folder)) + 1 :]
    assert dicts == data["loaded_dataset_dicts"]

    with registered(DATASET, register_pascal_voc, str(folder), "test", data["year"], class_names):
        evaluator = PascalVOCDetectionEvaluator(DATASET)
        evaluator.reset()
        for given, output in outputs_of(data["detections"]):
            evaluator.process([given], [output])
        _assert_results(evaluator.evaluate(), data["results"])


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def check_csv_format(data, arrays, name, tmp_path):
    results = data["results"]
    results["bbox"] = {metric: float(value) for metric, value in results["bbox"].items()}
    logger, handler = logging.getLogger("detectron2.evaluation.testing"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        print_csv_format(results)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert handler.lines == data["log_lines"]
    assert flatten_results_dict({"a": {"b": {"c": 1.0}, "d": 2.0}, "e": 3.0}) == data["flatten"]


CHECKS = {
    "coco_eval": check_coco_eval,
    "voc_eval_2007": check_voc_eval,
    "voc_eval_2012": check_voc_eval,
    "csv_format": check_csv_format,
}

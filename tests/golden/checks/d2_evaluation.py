"""Checks of the recordings about COCO and VOC evaluation and the printing of results."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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
from pycocotools.cocoeval import COCOeval

from d2_distill import provider

from ...embedded.detection_data import empty_output, outputs_of, registered, write_voc
from ..cases import Case
from ..recording import plain

DATASET = "golden_recording"


def _assert_results(actual, recorded):
    assert set(actual) == set(recorded)
    for task, metrics in recorded.items():
        assert list(actual[task]) == list(metrics)
        for metric, value in metrics.items():
            assert actual[task][metric] == pytest.approx(float(value), rel=1e-6, nan_ok=True), metric


def check_coco_eval(case: Case) -> None:
    data = case.data
    json_file = case.scratch / "annotations.json"
    json_file.write_text(json.dumps(plain(data["annotations"])))
    assert data["detections_columns"] == ["image_id", "xyxy box", "score", "contiguous class"]
    detections = plain(data["detections"])
    with registered(DATASET, register_coco_instances, {}, str(json_file), ""):
        dicts = load_coco_json(str(json_file), "", DATASET)
        for record in dicts:
            for annotation in record["annotations"]:
                annotation.pop("segmentation", None)
        assert dicts == data["loaded_dataset_dicts"]
        metadata = MetadataCatalog.get(DATASET)
        assert metadata.thing_classes == data["thing_classes"]
        assert {str(k): v for k, v in metadata.thing_dataset_id_to_contiguous_id.items()} == data["id_map"]

        folder = case.scratch / "inference"
        for key in data["results"]:
            with _evaluator(key, folder) as evaluator:
                _assert_results(_evaluate(evaluator, detections), data["results"][key])
        assert sorted(p.name for p in folder.iterdir()) == data["files_written"]
        written = json.loads((folder / "coco_instances_results.json").read_text())
        assert len(written) == len(detections)
        for actual, first in zip(written, data["first_two_result_json_entries"]):
            assert actual.keys() == first.keys()
            assert actual["bbox"] == pytest.approx(list(first["bbox"]), rel=1e-8)
            assert actual["score"] == pytest.approx(first["score"], rel=1e-8)
            assert actual["image_id"] == first["image_id"]
            assert actual["category_id"] == first["category_id"]

        evaluator = COCOEvaluator(DATASET, output_dir=str(folder))
        evaluator.reset()
        assert evaluator.evaluate() == data["no_process_call"]
        for image in data["annotations"]["images"]:
            evaluator.process([{"image_id": image["id"]}], [empty_output()])
        _assert_results(evaluator.evaluate(), data["only_empty_predictions"])


@contextlib.contextmanager
def _evaluator(key: str, folder: Path) -> Iterator[COCOEvaluator]:
    """The evaluator of a key such as "fastFalse_maxdets2".

    The embedded one has no arguments for these: it uses the faster implementation where that is installed, and
    the number of detections is a parameter of what evaluates.
    """
    is_fast, max_dets = re.fullmatch(r"fast(True|False)_maxdets(None|\d+)", key).groups()
    max_dets = ast.literal_eval(max_dets)
    if provider.name() == "real":
        yield COCOEvaluator(
            DATASET, output_dir=str(folder), use_fast_impl=is_fast == "True", max_dets_per_image=max_dets
        )
        return
    with pytest.MonkeyPatch.context() as patch:
        if is_fast == "False":
            patch.setitem(sys.modules, "faster_coco_eval", None)
        evaluator = COCOEvaluator(DATASET, output_dir=str(folder))
        if max_dets is not None:
            patch.setattr(evaluator, "_eval_class", lambda: partial(_limited, max_dets))
        yield evaluator


def _limited(max_dets: int, *args) -> COCOeval:
    evaluation = COCOeval(*args)
    evaluation.params.maxDets = [1, 10, max_dets]
    return evaluation


def _evaluate(evaluator, detections):
    evaluator.reset()
    for given, output in outputs_of(detections):
        evaluator.process([given], [output])
    return evaluator.evaluate()


def check_voc_eval(case: Case) -> None:
    data, folder = case.data, case.scratch / "voc"
    assert data["gt_columns"] == ["image", "class", "xmin ymin xmax ymax (1-based, as in the xml)", "difficult"]
    assert data["detections_columns"] == ["image", "xyxy 0-based", "score", "class index"]
    class_names, image_ids = plain(data["class_names"]), plain(data["image_ids"])
    write_voc(folder, "test", image_ids, plain(data["image_size_hw"]), plain(data["gt"]))
    dicts = load_voc_instances(str(folder), "test", class_names)
    for record in dicts:
        record["file_name"] = record["file_name"][len(str(folder)) + 1 :]
    assert dicts == data["loaded_dataset_dicts"]

    with registered(DATASET, register_pascal_voc, str(folder), "test", data["year"], class_names):
        results = _evaluate(PascalVOCDetectionEvaluator(DATASET), plain(data["detections"]))
        _assert_results(results, data["results"])


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def check_csv_format(case: Case) -> None:
    results = plain(case.data["results"])
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
    assert handler.lines == case.data["log_lines"]
    nested: dict[str, Any] = {}
    for key, value in case.data["flatten"].items():
        *path, last = key.split("/")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    assert flatten_results_dict(nested) == case.data["flatten"]


CHECKS = {
    "coco_eval": check_coco_eval,
    "voc_eval": check_voc_eval,
    "csv_format": check_csv_format,
}

"""Test-time augmentation of detectors of every family, after a training and by --eval-only."""

from __future__ import annotations

import json

import pytest

from .runs import FASTER_RCNN, TINY, merged, write_config

AUGMENTED = {"TEST": {"AUG": {"ENABLED": True, "MIN_SIZES": [40, 48], "MAX_SIZE": 64}}}


@pytest.mark.parametrize("kind", [{}, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
def test_results_after_training_are_those_of_an_evaluation(server, data, tmp_path, kind):
    folder = tmp_path / "out"
    keys = {"SOLVER": {"MAX_ITER": 4}, "TEST": {"EVAL_PERIOD": 2}, "OUTPUT_DIR": str(folder)}
    config = write_config(tmp_path / "config.yaml", TINY, kind, data, AUGMENTED, keys)
    server.run("--config-file", config).succeeded()
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert sum("bbox/AP" in row for row in rows) == 2
    [trained] = [row for row in rows if "bbox_TTA/AP" in row]
    server.run(
        "--config-file", config, "--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth",
        "TEST.EXPECTED_RESULTS", [["bbox_TTA", "AP", trained["bbox_TTA/AP"], 1e-6]],
    ).succeeded()
    assert (folder / "inference_TTA" / "coco_instances_results.json").exists()

"""Test-time augmentation of detectors of every family, after a training and by --eval-only."""

from __future__ import annotations

import json

import pytest

from .runs import FASTER_RCNN, TINY, merged, write_config

AUGMENTED = {"TEST": {"AUG": {"ENABLED": True, "MIN_SIZES": [48, 64], "MAX_SIZE": 96}}}


@pytest.mark.parametrize("kind", [{}, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
def test_results_after_training_are_those_of_an_evaluation(server, data, tmp_path, kind):
    folder = tmp_path / "out"
    keys = {"SOLVER": {"MAX_ITER": 4}, "TEST": {"EVAL_PERIOD": 2}, "OUTPUT_DIR": str(folder)}
    config = write_config(tmp_path / "config.yaml", TINY, kind, data, AUGMENTED, keys)
    server.run("--config-file", config).succeeded()
    metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert sum("bbox_TTA/AP" in row for row in metrics) == 1 and sum("bbox/AP" in row for row in metrics) == 2
    server.run("--config-file", config, "--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth").succeeded()
    assert "bbox_TTA" in (folder / "inference" / "log.txt").read_text()
    assert (folder / "inference" / "config.yaml").exists() and (folder / "inference_TTA").is_dir()

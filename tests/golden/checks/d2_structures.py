"""Recorded numbers of boxes, image batches, training scalars; check values of the hash formulas."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, ImageList, pairwise_iou, pairwise_point_box_distance
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter

from ..cases import golden_image, hash_u, parameter_value

LEFT_OUT = {
    "boxes: intersection, ioa, matched_iou_first4": "nothing in the project compares boxes so",
    "image_list: padding_constraints": "no backbone of the project has any",
    "events: name_scope": "the project names its scalars in full",
}


def _close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-6)


def check_hash(data, arrays, name, tmp_path):
    stem = "backbone.bottom_up.stem.conv1.weight"
    actual = {
        'hash_u("a",4)': hash_u("a", 4),
        f'hash_u("{stem}",3,salt=2)': hash_u(stem, 3, salt=2),
        'param_value("head.cls_score.bias",[3])': parameter_value("head.cls_score.bias", [3]),
        'param_value("head.cls_score.weight",[2,2,1,1]) flattened':
            parameter_value("head.cls_score.weight", [2, 2, 1, 1]).flatten(),
        'image "x" 2x2 flattened': golden_image("x", 2, 2).flatten(),
    }
    assert actual.keys() == data.keys()
    for key, value in actual.items():
        _close(value, data[key])


def check_boxes(data, arrays, name, tmp_path):
    a, b = Boxes(torch.tensor(data["a"])), Boxes(torch.tensor(data["b"]))
    _close(a.area(), data["area_a"])
    _close(pairwise_iou(a, b), data["iou"])
    _close(pairwise_point_box_distance(a.get_centers(), b), data["point_box_distance"])
    _close(a.get_centers(), data["centers"])
    assert a.inside_box((90, 90), boundary_threshold=5).tolist() == data["inside_h90_w90_thr5"]
    clipped, scaled = (Boxes(torch.tensor(data["a"])) for _ in range(2))
    clipped.clip((60, 80))
    _close(clipped.tensor, data["clip_h60_w80"])
    assert clipped.nonempty().tolist() == data["nonempty_after_clip"]
    assert clipped.nonempty(threshold=20).tolist() == data["nonempty_thr20"]
    scaled.scale(0.5, 2)
    _close(scaled.tensor, data["scale_x0.5_y2"])
    _close(a.tensor, data["a"])
    degenerate = Boxes(torch.tensor(data["degenerate_iou"]["boxes"]))
    _close(pairwise_iou(degenerate, degenerate), data["degenerate_iou"]["iou"])
    _check_box_mode(data["boxmode"])


def _check_box_mode(data):
    xywh, xyxy = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
    assert {mode.name: int(mode) for mode in BoxMode} == data["values"]
    assert json.loads(json.dumps([xywh])) == [1]
    for box, modes, key, number in (
        ([1.0, 2.0, 3.0, 4.0], (xywh, xyxy), "xywh_to_xyxy_list", float),
        ((1.0, 2.0, 5.0, 9.0), (xyxy, xywh), "xyxy_to_xywh_tuple", float),
        ([1, 2, 3, 4], (xywh, xyxy), "int_list_stays_int", int),
    ):
        converted = BoxMode.convert(box, *modes)
        assert list(converted) == data[key] and type(converted) is type(box)
        assert all(type(value) is number for value in converted)


def check_image_list(data, arrays, name, tmp_path):
    for case in data["cases"]:
        if case["padding_constraints"]:
            continue
        images = [torch.ones(3, *size) for size in case["sizes"]]
        batch = ImageList.from_tensors(images, case["divisibility"], pad_value=0.5)
        assert list(batch.tensor.shape) == case["shape"]
        assert batch.tensor.sum().item() == pytest.approx(case["sum"])
        assert [list(size) for size in batch.image_sizes] == case["image_sizes"]
        assert all(torch.equal(batch[i], image) for i, image in enumerate(images))


def check_events(data, arrays, name, tmp_path):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("detectron2.utils.events")
    previous_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        latest = _record_events(data, tmp_path / "metrics.json")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)

    written = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert written == [pytest.approx(line) for line in data["json_lines"]]
    if not torch.cuda.is_available():
        assert lines == data["console_lines_cuda_unavailable"]
    expected_latest = {name: value for name, value in data["latest_at_end"].items() if "/" not in name}
    assert latest.keys() == expected_latest.keys()
    for scalar, expected in expected_latest.items():
        np.testing.assert_allclose(latest[scalar], expected, err_msg=scalar)


def _record_events(data, path):
    json_writer = JSONWriter(str(path), window_size=data["window_size"])
    printer = CommonMetricPrinter(data["max_iter"], window_size=data["window_size"])
    with EventStorage(0) as storage:
        for iteration, scalars in enumerate(data["per_iteration_scalars"]):
            storage.iter = iteration
            for key, value in scalars.items():
                storage.put_scalar(key, value, smoothing_hint=key != "lr" or data["lr_has_smoothing_hint"])
            if iteration in data["write_after_iterations"]:
                json_writer.write()
                printer.write()
        json_writer.close()
        return dict(storage.latest())


CHECKS = {
    "boxes": check_boxes,
    "events": check_events,
    "hash_check": check_hash,
    "image_list": check_image_list,
}

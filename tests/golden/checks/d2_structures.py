"""Recorded numbers of boxes, image batches, training scalars; check values of the hash formulas."""

from __future__ import annotations

import ast
import json
import logging
import re

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, ImageList, pairwise_iou, pairwise_point_box_distance
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter

from d2_distill.boxes.overlaps import pairwise_overlaps

from ..cases import Case, golden_image, hash_u, parameter_value
from ..recording import plain
from .d2_left_out import is_left_out


def _close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(plain(expected)), rtol=1e-6, atol=1e-6)


def check_hash(case: Case) -> None:
    """The keys are calls, or the tag and size of an image."""
    formulas = {"hash_u": hash_u, "param_value": parameter_value}
    for key, expected in case.data.items():
        image = re.fullmatch(r'image "(.*)" (\d+)x(\d+) flattened', key)
        if image:
            actual = golden_image(image[1], int(image[2]), int(image[3]))
        else:
            call = ast.parse(key.replace(" flattened", ""), mode="eval").body
            arguments = [ast.literal_eval(argument) for argument in call.args]
            options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
            actual = formulas[call.func.id](*arguments, **options)
        _close(actual.flatten(), expected)


def _numbers(key: str) -> list[float]:
    """Of a key such as "scale_x0.5_y2"."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", key)]


def check_boxes(case: Case) -> None:
    data = case.data
    a, b = (Boxes(torch.tensor(plain(data[key]))) for key in "ab")
    _close(a.area(), data["area_a"])
    _close(pairwise_iou(a, b), data["iou"])
    _close(pairwise_point_box_distance(a.get_centers(), b), data["point_box_distance"])
    _close(a.get_centers(), data["centers"])
    clipped = Boxes(torch.tensor(plain(data["a"])))
    for key, check in _KEYED_BOXES.items():
        for name in data:
            if name.startswith(key):
                check(name, data, clipped)
    assert clipped.nonempty().tolist() == data["nonempty_after_clip"]
    _close(a.tensor, data["a"])
    degenerate = Boxes(torch.tensor(plain(data["degenerate_iou"]["boxes"])))
    _close(pairwise_iou(degenerate, degenerate), data["degenerate_iou"]["iou"])
    _check_comparisons(data, a, b)
    _check_box_mode(data["boxmode"])


def _check_clip(name, data, clipped) -> None:
    height, width = _numbers(name)
    clipped.clip((int(height), int(width)))
    _close(clipped.tensor, data[name])


def _check_nonempty(name, data, clipped) -> None:
    (threshold,) = _numbers(name)
    assert clipped.nonempty(threshold=threshold).tolist() == data[name]


def _check_scale(name, data, clipped) -> None:
    scaled = Boxes(torch.tensor(plain(data["a"])))
    scaled.scale(*_numbers(name))
    _close(scaled.tensor, data[name])


def _check_inside(name, data, clipped) -> None:
    height, width, threshold = _numbers(name)
    boxes = Boxes(torch.tensor(plain(data["a"])))
    assert boxes.inside_box((height, width), boundary_threshold=threshold).tolist() == data[name]


# Start of a key that holds numbers -> its check; clipping comes first.
_KEYED_BOXES = {
    "clip_": _check_clip,
    "nonempty_thr": _check_nonempty,
    "scale_": _check_scale,
    "inside_": _check_inside,
}


def _check_comparisons(data, a: Boxes, b: Boxes) -> None:
    """By the project's own overlaps: the embedded Detectron2 has none but the IoU of all pairs."""
    ioa = pairwise_overlaps(b.tensor, a.tensor, "iof").t()
    _close(ioa, data["ioa"])
    _close(ioa * b.area(), data["intersection"])
    (matched,) = (key for key in data if key.startswith("matched_iou_first"))
    (count,) = map(int, _numbers(matched))
    _close(pairwise_iou(a[:count], b[:count]).diagonal(), data[matched])


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


def check_image_list(case: Case) -> None:
    for index, entry in enumerate(case.data["cases"]):
        options = plain(entry["padding_constraints"])
        assert options is None or isinstance(options, dict)
        if options and is_left_out(case, "padding_constraints", "cases", index):
            continue
        images = [torch.ones(3, *size) for size in plain(entry["sizes"])]
        constraints = {"padding_constraints": options} if options else {}
        batch = ImageList.from_tensors(images, entry["divisibility"], pad_value=0.5, **constraints)
        assert list(batch.tensor.shape) == entry["shape"]
        assert batch.tensor.sum().item() == pytest.approx(entry["sum"])
        assert [list(size) for size in batch.image_sizes] == entry["image_sizes"]
        assert all(torch.equal(batch[i], image) for i, image in enumerate(images))


def check_events(case: Case) -> None:
    data, lines = case.data, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("detectron2.utils.events")
    previous_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        latest = _record_events(data, case.scratch / "metrics.json")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)

    written = [json.loads(line) for line in (case.scratch / "metrics.json").read_text().splitlines()]
    assert written == [pytest.approx(line) for line in plain(data["json_lines"])]
    if torch.cuda.is_available():
        case.skip("console_lines_cuda_unavailable")  # the lines end with the GPU's memory
    else:
        assert lines == data["console_lines_cuda_unavailable"]
    assert latest.keys() == set(data["latest_at_end"])
    for scalar, expected in data["latest_at_end"].items():
        np.testing.assert_allclose(latest[scalar], plain(expected), err_msg=scalar)


def _record_events(data, path):
    json_writer = JSONWriter(str(path), window_size=data["window_size"])
    printer = CommonMetricPrinter(data["max_iter"], window_size=data["window_size"])
    with EventStorage(0) as storage:
        for iteration, scalars in enumerate(data["per_iteration_scalars"]):
            storage.iter = iteration
            for key, value in scalars.items():
                storage.put_scalar(key, value, smoothing_hint=key != "lr" or data["lr_has_smoothing_hint"])
            if iteration in list(data["write_after_iterations"]):
                json_writer.write()
                printer.write()
        json_writer.close()
        for name in data["latest_at_end"]:
            scope, _, scalar = name.rpartition("/")
            if scope:
                with storage.name_scope(scope):
                    storage.put_scalar(scalar, data["latest_at_end"][name][0])
        return dict(storage.latest())


CHECKS = {
    "boxes": check_boxes,
    "events": check_events,
    "hash_check": check_hash,
    "image_list": check_image_list,
}

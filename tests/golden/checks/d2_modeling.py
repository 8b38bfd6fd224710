"""Checks of the parts of models: anchors, box coding, matching, suppression, sampling, pooling."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling import detector_postprocess
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances

from d2_distill.boxes.geometry import centers_of, distances_to_sides
from d2_distill.detectors.box_coders import DistanceCoder

from ..cases import Case, hash_u
from ..recording import plain


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Assert equality up to the tolerances, of shapes too."""
    actual = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    expected = np.asarray(plain(expected), dtype=np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def check_anchors(case: Case) -> None:
    for entry in case.data["cases"]:
        generator = DefaultAnchorGenerator(
            **{key: plain(entry[key]) for key in ("sizes", "aspect_ratios", "strides", "offset")})
        assert list(generator.num_anchors) == entry["num_anchors"]
        assert not generator.state_dict()
        assert len(generator.cell_anchors) == len(entry["cell_anchors"])
        for actual, expected in zip(generator.cell_anchors, entry["cell_anchors"]):
            close(actual, expected)
        anchors = generator([torch.zeros(1, 1, h, w) for h, w in entry["grids_hw"]])
        assert len(anchors) == len(entry["anchors"])
        for actual, expected in zip(anchors, entry["anchors"]):
            close(actual.tensor, expected, atol=1e-5)


def check_box_regression(case: Case) -> None:
    data = case.data
    src, target, deltas = (torch.tensor(plain(data[key])) for key in ("src", "target", "deltas"))
    for key in data["results"]:
        expected = data["results"][key]
        if key == "linear_norm_False":
            _check_distances(src, target, deltas, expected)
            continue
        if key == "linear_norm_True":
            transform = Box2BoxTransformLinear()
        else:
            transform = Box2BoxTransform(weights=ast.literal_eval(key))
            assert transform.scale_clamp == pytest.approx(data["scale_clamp"])
            both = transform.apply_deltas(torch.cat([deltas, deltas * 0.5], dim=1), src)
            close(both, expected["apply_two_classes"], atol=1e-3)
        close(transform.get_deltas(src, target), expected["get_deltas"])
        close(transform.apply_deltas(deltas, src), expected["apply_deltas"], atol=1e-3)

    recorded = data["dense_loss_sum"]
    (factor,) = re.fullmatch(r"deltas\*([\d.]+)", recorded["pred_deltas"]).groups()
    for key, expected in recorded["values"].items():
        loss_type, beta = key.rsplit("_beta", 1)
        loss = _dense_box_regression_loss(
            [Boxes(src)], Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)), [deltas[None] * float(factor)], [target],
            torch.tensor([plain(recorded["fg_mask"])]), box_reg_loss_type=loss_type, smooth_l1_beta=float(beta))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def _check_distances(src, target, deltas, expected) -> None:
    """In pixels, which FCOS's boxes are in the project's own coder with strides of 1."""
    close(distances_to_sides(centers_of(src), target), expected["get_deltas"])
    boxes = DistanceCoder("relu").decode(deltas, src, torch.ones(len(src)))
    close(boxes, expected["apply_deltas"], atol=1e-3)


def check_matcher_nms_sampling(case: Case) -> None:
    data = case.data
    quality = torch.tensor(plain(data["quality"]))
    for entry in data["matcher"]:
        matcher = Matcher(
            plain(entry["thresholds"]), plain(entry["labels"]), allow_low_quality_matches=entry["allow_low_quality"])
        matches, labels = matcher(quality)
        assert matches.dtype == torch.int64 and labels.dtype == torch.int8
        assert matches.tolist() == entry["matches"]
        assert labels.tolist() == entry["match_labels"]
    empty = data["matcher_no_gt"]
    assert empty["quality_shape"][0] == 0
    # No threshold is reached without ground truth.
    thresholds = [(index + 1) / len(empty["labels"]) for index in range(len(empty["labels"]) - 1)]
    matches, labels = Matcher(thresholds, plain(empty["labels"]))(torch.zeros(plain(empty["quality_shape"])))
    assert matches.tolist() == empty["matches"] and labels.tolist() == empty["match_labels"]

    nms = data["nms"]
    boxes, scores, ids = (torch.tensor(plain(nms[key])) for key in ("boxes", "scores", "ids"))
    for threshold, keep in nms["keep"].items():
        assert batched_nms(boxes, scores, ids, float(threshold)).tolist() == keep

    sample = data["subsample"]
    labels = torch.tensor(plain(sample["labels"]))
    torch.manual_seed(sample["torch_seed"])
    for key in (key for key in sample if key.startswith("num")):
        count, fraction, is_sorted = re.fullmatch(r"num(\d+)_frac([\d.]+?)(_sorted)?", key).groups()
        drawn = subsample_labels(labels, int(count), float(fraction), sample["bg_label"])
        drawn = [sorted(x.tolist()) if is_sorted else x.tolist() for x in drawn]
        assert dict(zip(("pos", "neg"), drawn)) == sample[key]


def check_roi_pooler(case: Case) -> None:
    data = case.data
    tag, channels, height, width, last, scales, side, size, level = re.fullmatch(
        r'float32\(hash_u\("(\w+):<i>"\)\) reshaped \(1,(\d+),(\d+)>>i,(\d+)>>i\), i=0\.\.(\d+); '
        r"scales ([\d/,]+); output (\d+)x\7; canonical size (\d+) level (\d+)",
        data["features"],
    ).groups()
    channels, side = int(channels), int(side)
    features = []
    for i in range(int(last) + 1):
        h, w = int(height) >> i, int(width) >> i
        values = hash_u(f"{tag}:{i}", channels * h * w).astype(np.float32)
        features.append(torch.from_numpy(values).reshape(1, channels, h, w))
    scales = [int(top) / int(bottom) for top, bottom in (scale.split("/") for scale in scales.split(","))]
    boxes = Boxes(torch.tensor(plain(data["boxes"])))
    for key, expected in data["results_flat"].items():
        pooler_type, ratio = key.split("_sr")
        pooler = ROIPooler(side, scales, int(ratio), pooler_type, int(size), int(level))
        pooled = pooler(features, [boxes])
        assert pooled.shape == (len(boxes), channels, side, side)
        close(pooled.flatten(), expected)
        assert pooler(features, [boxes[:0]]).shape == (0, channels, side, side)

    squares = data["level_assignment_for_squares"]
    sides = torch.tensor(plain(squares["sides"]), dtype=torch.float32)
    boxes = Boxes(torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], dim=1))
    levels = assign_boxes_to_levels(
        [boxes], squares["min_level"], squares["max_level"], *squares["canonical"])
    assert levels.tolist() == squares["levels_minus_2"]


def check_postprocess(case: Case) -> None:
    data = case.data
    boxes = Boxes(torch.tensor(plain(data["boxes"])))
    scores = torch.arange(len(boxes)).float()
    results = Instances(tuple(data["image_size_hw"]), pred_boxes=boxes, scores=scores)
    output = detector_postprocess(results, *data["output_hw"])
    assert output.image_size == tuple(data["output_hw"])
    close(output.pred_boxes.tensor, data["out_boxes"])
    assert output.scores.tolist() == data["kept_scores"]
    close(results.pred_boxes.tensor, data["input_boxes_modified_in_place_or_rebound"])


CHECKS = {
    "anchors": check_anchors,
    "box_regression": check_box_regression,
    "matcher_nms_sampling": check_matcher_nms_sampling,
    "roi_pooler": check_roi_pooler,
    "postprocess": check_postprocess,
}

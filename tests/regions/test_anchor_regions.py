"""Regions of anchors and locations against loops over images, boxes and anchors."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.assigners import atss_thresholds
from d2_distill.boxes.geometry import centers_of
from d2_distill.regions import VALUABLE_OVERLAPS, finegrained_region, inside_boxes, valuable_region

from ..assigners.scenes import SCENES, boxes_of, build, slow_iou, usable_anchors


def _slow_distance_iou(anchor, box, overlap):
    width = min(anchor[2], box[2]) - max(anchor[0], box[0])
    height = min(anchor[3], box[3]) - max(anchor[1], box[1])
    area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
    part = max(width, 0) * max(height, 0) / area if overlap == "iof" else slow_iou(anchor, box)
    distance = math.hypot(*(anchor[i] + anchor[i + 2] - box[i] - box[i + 2] for i in (0, 1))) / 2
    diagonal = math.hypot(
        max(anchor[2], box[2]) - min(anchor[0], box[0]), max(anchor[3], box[3]) - min(anchor[1], box[1])
    )
    return part - distance**2 / diagonal**2


def _slow_valuable(scene, image, thresholds, gamma, overlap):
    values = [0.0] * len(scene.anchors)
    anchors = scene.anchors.tolist()
    for i in usable_anchors(scene, image):
        for threshold, box in zip(thresholds, boxes_of(scene, image)):
            if gamma * threshold <= _slow_distance_iou(anchors[i], box, overlap) < threshold:
                values[i] = max(values[i], slow_iou(anchors[i], box))
    return values


def _slow_finegrained(scene, image, factor):
    mask = [False] * len(scene.anchors)
    anchors, usable = scene.anchors.tolist(), usable_anchors(scene, image)
    for box in boxes_of(scene, image):
        overlaps = {i: slow_iou(anchors[i], box) for i in usable}
        for i, overlap in overlaps.items():
            mask[i] = mask[i] or overlap > factor * max(overlaps.values())
    return mask


def _slow_inside(scene, image):
    return [
        any(box[0] < x < box[2] and box[1] < y < box[3] for box in boxes_of(scene, image))
        for x, y in centers_of(scene.anchors).tolist()
    ]


@pytest.mark.parametrize("gamma", [0.25, 0.6])
@pytest.mark.parametrize("overlap", VALUABLE_OVERLAPS)
@pytest.mark.parametrize("name", SCENES)
def test_valuable_region(name, overlap, gamma):
    scene = build(**SCENES[name])
    thresholds = atss_thresholds(
        scene.anchors, scene.level_sizes, scene.gt.boxes, scene.valid_anchors, topk=9
    )
    values = valuable_region(
        scene.anchors,
        scene.gt.boxes,
        scene.gt.valid,
        thresholds,
        scene.valid_anchors,
        gamma=gamma,
        overlap=overlap,
    )
    assert values.shape == (4, len(scene.anchors))
    for image in range(4):
        of_boxes = thresholds[image, scene.gt.valid[image]].tolist()
        expected = _slow_valuable(scene, image, of_boxes, gamma, overlap)
        assert values[image].tolist() == pytest.approx(expected, abs=1e-12)
    assert values.any() == scene.gt.valid.any()


@pytest.mark.parametrize("factor", [0.5, 0.8])
@pytest.mark.parametrize("name", SCENES)
def test_finegrained_region(name, factor):
    scene = build(**SCENES[name])
    mask = finegrained_region(
        scene.anchors, scene.gt.boxes, scene.gt.valid, scene.valid_anchors, factor=factor
    )
    assert mask.dtype == torch.bool
    assert mask.tolist() == [_slow_finegrained(scene, image, factor) for image in range(4)]
    assert mask.any() == scene.gt.valid.any()


@pytest.mark.parametrize("name", SCENES)
def test_inside_boxes(name):
    scene = build(**SCENES[name])
    mask = inside_boxes(centers_of(scene.anchors), scene.gt.boxes, scene.gt.valid)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [_slow_inside(scene, image) for image in range(4)]
    assert mask.any() == scene.gt.valid.any()


def test_padded_boxes_count_for_nothing_whatever_they_hold():
    scene = build(0)
    boxes = scene.gt.boxes.masked_fill(~scene.gt.valid[..., None], 0)
    junk = torch.where(scene.gt.valid[..., None], boxes, torch.tensor([0.0, 0.0, 90.0, 90.0]).double())
    centers, valid = centers_of(scene.anchors), scene.gt.valid
    thresholds = torch.full(valid.shape, 0.4, dtype=torch.float64)
    for region in (
        lambda boxes: inside_boxes(centers, boxes, valid),
        lambda boxes: finegrained_region(scene.anchors, boxes, valid),
        lambda boxes: valuable_region(scene.anchors, boxes, valid, thresholds),
    ):
        assert torch.equal(region(boxes), region(junk))
        assert not region(junk)[1].any()


def test_a_point_on_a_side_is_outside():
    points = torch.tensor([[4.0, 8.0], [4.5, 8.0], [19.5, 16.0], [19.5, 15.5]])
    boxes = torch.tensor([[[4.0, 0.0, 20.0, 16.0]]])
    mask = inside_boxes(points, boxes, torch.ones(1, 1, dtype=torch.bool))
    assert mask.tolist() == [[False, True, False, True]]

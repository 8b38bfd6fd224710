"""FCOS assignment against loops over images, points and boxes."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.assigners import BACKGROUND, match_points
from d2_distill.boxes.geometry import centers_of

from .scenes import SCENES, boxes_of, build

RANGES = [[-1.0, 16.0], [16.0, 40.0], [40.0, math.inf]]


def _ranges(scene):
    return torch.tensor(RANGES, dtype=torch.float64).repeat_interleave(torch.tensor(scene.level_sizes), dim=0)


def _fits(point, stride, size_range, box, radius):
    x, y = point
    left, top, right, bottom = box
    if not size_range[0] <= max(x - left, right - x, y - top, bottom - y) <= size_range[1]:
        return False
    if radius > 0:
        center_x, center_y = (left + right) / 2, (top + bottom) / 2
        if max(abs(x - center_x), abs(y - center_y)) >= radius * stride:
            return False
    return left < x < right and top < y < bottom


def _slow_points(scene, image, radius):
    ranges, matches = _ranges(scene).tolist(), []
    for point, stride, size_range in zip(centers_of(scene.anchors).tolist(), scene.strides.tolist(), ranges):
        fitting = [
            ((box[2] - box[0]) * (box[3] - box[1]), index)
            for index, box in enumerate(boxes_of(scene, image))
            if _fits(point, stride, size_range, box, radius)
        ]
        matches.append(min(fitting)[1] if fitting else BACKGROUND)
    return matches


@pytest.mark.parametrize("radius", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("name", SCENES)
def test_matches_loops(name, radius):
    scene = build(**SCENES[name])
    matches = match_points(
        centers_of(scene.anchors),
        scene.strides,
        _ranges(scene),
        scene.gt.boxes,
        scene.gt.valid,
        center_sampling_radius=radius,
    )
    assert matches.dtype == torch.int64
    assert matches.tolist() == [_slow_points(scene, image, radius) for image in range(len(matches))]
    assert (matches >= 0).any() == scene.gt.valid.any()


def _match_one(point, box, size_range=(-1.0, math.inf), radius=0.0, stride=8.0):
    boxes = torch.tensor([box]).view(1, -1, 4)
    return match_points(
        torch.tensor([point]),
        torch.tensor([stride]),
        torch.tensor([size_range]),
        boxes,
        torch.ones(boxes.shape[:2], dtype=torch.bool),
        center_sampling_radius=radius,
    ).item()


def test_a_point_on_a_side_is_outside():
    assert _match_one((4.0, 8.0), (4.0, 0.0, 20.0, 16.0)) == BACKGROUND
    assert _match_one((4.5, 8.0), (4.0, 0.0, 20.0, 16.0)) == 0


def test_both_ends_of_a_range_belong_to_it():
    box = (0.0, 0.0, 64.0, 32.0)  # the point's farthest side is 60 pixels off
    for size_range in ((60.0, 64.0), (16.0, 60.0)):
        assert _match_one((4.0, 16.0), box, size_range) == 0
    for size_range in ((60.5, 64.0), (16.0, 59.5)):
        assert _match_one((4.0, 16.0), box, size_range) == BACKGROUND


def test_the_border_of_the_central_square_is_outside():
    box = (0.0, 0.0, 64.0, 64.0)
    assert _match_one((20.0, 32.0), box, radius=1.5) == BACKGROUND
    assert _match_one((20.5, 32.0), box, radius=1.5) == 0


def test_of_equal_areas_the_first_box_wins():
    tall, wide, small = (0.0, 0.0, 20.0, 40.0), (0.0, 0.0, 40.0, 20.0), (1.0, 1.0, 12.0, 12.0)
    assert _match_one((10.0, 10.0), (tall, wide)) == 0
    assert _match_one((10.0, 10.0), (wide, tall)) == 0
    assert _match_one((10.0, 10.0), (wide, tall, small)) == 2

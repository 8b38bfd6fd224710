"""Choices of a recipe as functions of objects and images."""

from __future__ import annotations

import math

import numpy as np
import pytest

from d2_distill.apps.recipe import choices
from d2_distill.apps.recipe.detectors import HEADS, PAIRS, head_keys
from d2_distill.apps.recipe.objects import Objects
from d2_distill.errors import UserError


def objects(pixels, side=640, aspect=0.75):
    """Objects of these sides in images of a longer side."""
    return Objects(np.array(pixels, dtype=float) / side, np.array([side]), aspect)


def record(width, height, boxes, crowd=()):
    rows = [{"bbox": list(box), "bbox_mode": 0, "category_id": 0, "iscrowd": int(i in crowd)} for i, box in enumerate(boxes)]
    return {"width": width, "height": height, "annotations": rows}


def test_sizes_are_parts_of_the_longer_side():
    found = Objects.from_records([
        record(200, 100, [(0, 0, 20, 20), (0, 0, 40, 10)]), record(50, 100, [(0, 0, 10, 10), (0, 0, 50, 50)], crowd=[1]),
    ])
    assert found.sizes.tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert found.longer_sides.tolist() == [200, 100] and found.aspect == 0.5
    assert found.percentiles(192) == pytest.approx(dict.fromkeys((5, 25, 50, 75, 95), 19.2))


@pytest.mark.parametrize(
    "smallest, own, longest, side",
    [
        (48, 640, 800, 320),  # scaled by a half they have 24 pixels
        (12, 640, 800, 640),  # no larger than they are
        (12, 640, 192, 192),  # no larger than the size of the detector
        (600, 640, 800, 96),
        (30, 70, 800, 96),
    ],
)
def test_image_side(smallest, own, longest, side):
    found = choices.image_side(objects([smallest] * 100, side=own), longest)
    assert found == side and found % choices.SIDE_STEP == 0


def test_anchors_reach_most_objects():
    # In images of 640 pixels; the anchors of a scale of s have sides of 8 s to 32 s.
    for pixels, scale in ((30, 2), (64, 4), (130, 8), (500, 8)):
        found = objects([pixels] * 10)
        assert choices.anchor_scale(found, 640) == scale
    mixed = objects([20] * 80 + [450] * 20)
    assert mixed.reached(640, choices.anchors(choices.anchor_scale(mixed, 640))) == pytest.approx(0.8)
    every = objects(range(40, 300))
    assert every.reached(640, choices.anchors(choices.anchor_scale(every, 640))) == 1


@pytest.mark.parametrize("head", HEADS)
def test_heads_read_the_same_sizes(head):
    keys = head_keys(head, scale=4, convs=2)
    if head == "RetinaNet":
        assert [sizes[0] for sizes in keys["ANCHOR_GENERATOR"]["SIZES"]] == [32, 64, 128]
    elif head == "OpenMMLabFCOS":
        assert keys["FCOS"]["SIZES_OF_INTEREST"] == [32, 64]
    else:
        assert keys[HEADS[head]]["ANCHOR_SCALE"] == 4


def test_a_batch_is_not_larger_than_the_data():
    tiny = choices.SIZES["tiny"]
    assert choices.batch_size(tiny, 5) == 5 and choices.batch_size(tiny, 500) == 8


def test_rate_by_the_root_of_the_batch():
    assert choices.learning_rate(8, pretrained=True) == 0.001 and choices.learning_rate(8, pretrained=False) == 0.002
    assert choices.learning_rate(32, pretrained=True) == 0.002


def test_passes():
    assert [choices.passes(images, pretrained=False) for images in (100, 292, 1846, 118_000)] == [60, 60, 22, 12]
    assert [choices.passes(images, pretrained=True) for images in (100, 1000, 1846)] == [60, 20, 12]
    assert choices.iterations(292, 8, 60) == 2190 == math.ceil(292 * 60 / 8 / 10) * 10
    assert choices.iterations(1, 1, 12) % choices.EVALUATIONS == 0


def test_budget():
    assert choices.iterations_in(600, 1.0, images=100, batch=10, wanted=1200) == 600
    assert choices.iterations_in(6000, 1.0, images=100, batch=10, wanted=1200) == 1200
    with pytest.raises(UserError, match="only 5.0 passes over the 100 images would fit; give at least 2min, a smaller"):
        choices.iterations_in(50, 1.0, images=100, batch=10, wanted=1200)


def test_every_size_has_a_pair():
    assert set(PAIRS) == {(size, pretrained) for size in choices.SIZES for pretrained in (True, False)}
    for (_, pretrained), pair in PAIRS.items():
        assert all(bool(backbone.weights) == pretrained for backbone in pair)

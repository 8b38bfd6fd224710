"""Assigners and regions in chunks of boxes against themselves at once, and how large their tensors get."""

from __future__ import annotations

import pytest
import torch

from d2_distill.assigners import (
    GroundTruth,
    atss_thresholds,
    match_atss,
    match_max_iou,
    match_points,
    match_task_aligned,
)
from d2_distill.boxes import chunks
from d2_distill.boxes.geometry import centers_of
from d2_distill.regions import finegrained_region, focal_masks, inside_boxes, valuable_region

from ..assigners.scenes import SCENES, Scene, build
from ..largest_tensor import LargestTensor


def _atss(scene):
    match = match_atss(scene.anchors, scene.level_sizes, scene.gt.boxes, scene.gt.valid, scene.valid_anchors)
    return match.matches, match.thresholds * scene.gt.valid


def _thresholds(scene, valid_boxes=None):
    return atss_thresholds(
        scene.anchors, scene.level_sizes, scene.gt.boxes, scene.valid_anchors, valid_boxes=valid_boxes
    )


def _points(scene, radius):
    sizes = scene.strides[:, None] * scene.strides.new_tensor([1, 5])
    points = centers_of(scene.anchors)
    return match_points(points, scene.strides, sizes, scene.gt.boxes, scene.gt.valid, radius)


def _valuable(scene, overlap):
    thresholds = _thresholds(scene, scene.gt.valid)
    return valuable_region(
        scene.anchors, scene.gt.boxes, scene.gt.valid, thresholds, scene.valid_anchors, overlap=overlap
    )


def _task_aligned(scene):
    """Predictions are given by the anchors' places alone, so that they differ and need no generator."""
    num_images, num_anchors = len(scene.gt.boxes), len(scene.anchors)
    places = torch.arange(num_images * num_anchors * 7, dtype=scene.anchors.dtype, device=scene.anchors.device)
    scores = (places.view(num_images, num_anchors, 7) * 0.37).sin().abs()
    predicted = (scene.anchors * 1.01).expand(num_images, -1, -1)
    return match_task_aligned(
        scores, predicted, scene.anchors, scene.gt.boxes, scene.gt.classes, scene.gt.valid, scene.valid_anchors,
        topk=13, alpha=1.0, beta=6.0,
    )


# Name -> function of a scene, which gives a tensor or some.
FUNCTIONS = {
    "match_task_aligned": _task_aligned,
    "match_max_iou": lambda scene: match_max_iou(
        scene.anchors,
        scene.gt.boxes,
        scene.gt.valid,
        scene.valid_anchors,
        thresholds=(0.4, 0.5),
        labels=(0, -1, 1),
    ),
    "match_atss": _atss,
    "atss_thresholds": _thresholds,
    "atss_thresholds of real boxes": lambda scene: _thresholds(scene, scene.gt.valid) * scene.gt.valid,
    "match_points": lambda scene: _points(scene, 0.0),
    "match_points near centers": lambda scene: _points(scene, 1.5),
    "valuable_region": lambda scene: _valuable(scene, "iof"),
    "valuable_region by DIoU": lambda scene: _valuable(scene, "union"),
    "finegrained_region": lambda scene: finegrained_region(
        scene.anchors, scene.gt.boxes, scene.gt.valid, scene.valid_anchors
    ),
    "inside_boxes": lambda scene: inside_boxes(centers_of(scene.anchors), scene.gt.boxes, scene.gt.valid),
    "focal_masks": lambda scene: focal_masks(scene.gt.boxes, scene.gt.valid, (10, len(scene.anchors) // 10), 4.0),
}


# Task-aligned scores are powers, whose last bit depends on an element's place in a vector of the processor.
POWERS = 1e-6


def _with_ties(seed: int) -> Scene:
    """Boxes of whole pixels on anchors of whole pixels, many of them equal, in places that padding is among."""
    generator = torch.Generator().manual_seed(seed)
    scene = build(seed, counts=(12, 0, 6, 12), some_invalid=True)
    anchors = scene.anchors.round()
    boxes = anchors[torch.randint(len(anchors), (4, 12), generator=generator)]
    boxes = boxes + 4 * torch.randint(-2, 3, (4, 12, 4), generator=generator)
    boxes[..., 2:] = boxes[..., 2:].maximum(boxes[..., :2])
    boxes[:, 6:] = boxes[:, :6]
    boxes[3, 2:4] += 900
    valid = scene.gt.valid.clone()
    valid[0, [1, 10, 11]] = False
    return scene._replace(anchors=anchors.float(), gt=GroundTruth(boxes.float(), scene.gt.classes, valid))


def _scene(name: str) -> Scene:
    return _with_ties(int(name[-1])) if name.startswith("ties") else build(**SCENES[name])


def _tensors(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _limit(monkeypatch, pairs: int) -> None:
    monkeypatch.setattr(chunks, "MAX_PAIRS", pairs)
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", pairs)


@pytest.mark.parametrize("pairs", [1, 7, 500, 1000, 2500])
@pytest.mark.parametrize("scene", [*SCENES, "ties 0", "ties 1"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_change_no_bit(monkeypatch, name, scene, pairs):
    scene = _scene(scene)
    at_once = _tensors(FUNCTIONS[name](scene))
    _limit(monkeypatch, pairs)
    in_chunks = _tensors(FUNCTIONS[name](scene))
    assert len(list(chunks.box_chunks(scene.gt.valid, len(scene.anchors)))) > 1 or not scene.gt.valid.any()
    for expected, found in zip(at_once, in_chunks):
        tolerance = POWERS if name == "match_task_aligned" and found.is_floating_point() else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("pairs", [10, 35, 60, 100, 139])
def test_chunks_are_small_and_hold_every_box_once(monkeypatch, pairs):
    """10 anchors, and 14 places for boxes."""
    _limit(monkeypatch, pairs)
    counts = torch.tensor([3, 0, 7, 1, 2, 0])
    valid = torch.arange(7) < counts[:, None]
    valid[2, 5] = False
    seen, order = torch.zeros(6, 7, dtype=torch.int64), []
    for images, boxes in chunks.box_chunks(valid, 10):
        seen[images, boxes] += 1
        order.append((images.start, boxes.start))
        assert seen[images, boxes].numel() * 10 <= pairs
        assert boxes.stop <= max(1, *counts[images].tolist(), 1)
    assert seen.max() == 1 and (seen[valid] == 1).all() and (seen[:, 0] == 1).all()
    assert order == sorted(order)


def test_few_boxes_are_taken_together(monkeypatch):
    monkeypatch.setattr(chunks, "MAX_PAIRS", 420)
    valid = torch.arange(7) < torch.tensor([3, 0, 7, 1, 2, 0])[:, None]
    assert list(chunks.box_chunks(valid, 10)) == [(slice(0, 6), slice(0, 7))]
    monkeypatch.setattr(chunks, "MAX_PAIRS", 419)
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", 65)
    assert list(chunks.box_chunks(valid, 10)) == [
        (slice(0, 2), slice(0, 3)),
        (slice(2, 3), slice(0, 6)),
        (slice(2, 3), slice(6, 7)),
        (slice(3, 6), slice(0, 2)),
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_few_boxes_need_no_wait_for_the_device(monkeypatch, name):
    """A meta tensor has no values to read."""
    scene = build(**SCENES["both"])
    tensors = scene.gt.boxes, scene.gt.classes, scene.gt.valid
    scene = Scene(
        scene.anchors.to("meta"),
        scene.level_sizes,
        scene.strides.to("meta"),
        GroundTruth(*(tensor.to("meta") for tensor in tensors)),
        scene.valid_anchors.to("meta"),
    )
    expected = _tensors(FUNCTIONS[name](build(**SCENES["both"])))
    found = _tensors(FUNCTIONS[name](scene))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    _limit(monkeypatch, 1)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        FUNCTIONS[name](scene)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_thousands_of_boxes_in_an_image(name):
    """3,000 boxes and 8,000 anchors: 96 million pairs in a batch of 4 images."""
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape):
        corners = torch.rand(*shape, 2, generator=generator) * 800
        return torch.cat([corners, corners + 4 + torch.rand(*shape, 2, generator=generator) ** 3 * 200], dim=-1)

    level_sizes = [6000, 1500, 500]
    valid = torch.arange(3000) < torch.tensor([7, 3000, 0, 60])[:, None]
    scene = Scene(
        boxes(8000),
        level_sizes,
        torch.tensor([8.0, 16.0, 32.0]).repeat_interleave(torch.tensor(level_sizes)),
        GroundTruth(boxes(4, 3000) * valid[..., None], valid.long(), valid),
        torch.rand(4, 8000, generator=generator) > 0.1,
    )
    with LargestTensor() as largest:
        found = _tensors(FUNCTIONS[name](scene))
    assert len(found[0]) == 4 and found[0][1].any()
    assert 0 < largest.numel <= chunks.CHUNK_PAIRS

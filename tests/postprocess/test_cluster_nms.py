"""Cluster-NMS against a greedy loop, and boxes at the limits."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torchvision.ops import batched_nms

from d2_distill.postprocess import cluster_nms

from ..largest_tensor import LargestTensor

# The package has a function of the module's name.
module = importlib.import_module("d2_distill.postprocess.cluster_nms")
VARIANTS = [(overlap, voting) for overlap in ("iou", "diou") for voting in ("none", "weighted", "score")]


def _iou_and_overlap(a, b, overlap):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    iou = width * height / (sum(areas) - width * height)
    if overlap == "iou":
        return iou, iou
    centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b)]
    diagonal = math.dist((min(a[0], b[0]), min(a[1], b[1])), (max(a[2], b[2]), max(a[3], b[3])))
    return iou, iou - (math.dist(*centres) ** 2 / (diagonal**2 + 1e-7)) ** 0.8


def _greedy(boxes, scores, classes, threshold, overlap, voting):
    """One box after the other, in Python's float64."""
    boxes, scores, classes = boxes.tolist(), scores.tolist(), classes.tolist()
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    keep, voted, suppressed = [], [], set()
    for place, i in enumerate(order):
        if i in suppressed:
            continue
        keep.append(i)
        weights, sums = 0.0, [0.0] * 4
        for j in order[place:]:
            if classes[i] != classes[j]:
                continue
            iou, x = _iou_and_overlap(boxes[i], boxes[j], overlap)
            if j != i and x > threshold:
                suppressed.add(j)
            if voting == "score":
                weight = math.exp(-((1 - (x if x > 0.7 else 0.0)) ** 2) / 0.025)
            elif voting == "weighted":
                weight = iou if x > threshold else 0.0
            else:
                weight = float(i == j)
            weights += weight * scores[j]
            sums = [total + weight * scores[j] * side for total, side in zip(sums, boxes[j])]
        voted.append([total / weights for total in sums])
    return keep, voted


def _clustered(n, seed, classes=3):
    """Boxes in a few places, the classes on top of each other, at coordinates of any size."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[60.0, 60.0], [90.0, 75.0], [5000.0, 40.0], [-300.0, 9000.0]])
    centres = centres[torch.randint(4, (n,), generator=generator)]
    centres = centres + 4 * torch.randn(n, 2, generator=generator)
    sizes = 40 + 12 * torch.rand(n, 2, generator=generator)
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
    return boxes, torch.rand(n, generator=generator), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("overlap, voting", VARIANTS)
def test_equals_a_greedy_loop(overlap, voting, threshold):
    for seed, n in enumerate((1, 2, 15, 120)):
        detections = _clustered(n, seed)
        keep, boxes = cluster_nms(*detections, threshold, overlap=overlap, voting=voting)
        expected_keep, expected_boxes = _greedy(*detections, threshold, overlap, voting)
        assert keep.tolist() == expected_keep
        torch.testing.assert_close(boxes, torch.tensor(expected_boxes), rtol=1e-6, atol=1e-4)
    assert len(keep) < n and voting == "none" or not torch.equal(boxes, detections[0][keep])


def _with_ties(n, seed, classes):
    """Equal scores, and boxes of whole pixels that occur several times in a class."""
    boxes, scores, labels = _clustered(n, seed, classes)
    boxes, scores = (boxes / 4).round() * 4, (scores * 8).round() / 8
    again = torch.randint(n, (n // 2,), generator=torch.Generator().manual_seed(seed))
    return tuple(torch.cat([x, x[again]]) for x in (boxes, scores, labels))


@pytest.mark.parametrize("pairs", [1, 500, 7000])
@pytest.mark.parametrize("overlap, voting", VARIANTS)
def test_blocks_of_pairs_change_nothing(monkeypatch, overlap, voting, pairs):
    cases = [_clustered(200, 0), _clustered(150, 1, classes=1), _with_ties(120, 2, 4), _with_ties(90, 3, 60)]
    at_once = [cluster_nms(*detections, 0.6, overlap=overlap, voting=voting) for detections in cases]
    monkeypatch.setattr(module, "MAX_PAIRS", pairs)
    for detections, (expected_keep, expected_boxes) in zip(cases, at_once):
        keep, boxes = cluster_nms(*detections, 0.6, overlap=overlap, voting=voting)
        assert torch.equal(keep, expected_keep)
        # The last digit of a power depends on where in a tensor it stands.
        torch.testing.assert_close(boxes, expected_boxes, rtol=1e-6, atol=0)


def test_blocks_are_small_and_have_every_pair_of_a_class_once(monkeypatch):
    classes = torch.tensor([0] * 9 + [1, 2, 3, 3, 3] + [4] * 5)
    for pairs in (1, 9, 10, 25, 60, 19 * 19 - 1):
        monkeypatch.setattr(module, "MAX_PAIRS", pairs)
        seen = torch.zeros(19, 19, dtype=torch.int64)
        for rows, columns in module._blocks(classes):
            seen[rows, columns] += 1
            height, width = seen[rows, columns].shape
            assert height * width <= pairs or height == 1
        assert seen.max() == 1
        assert (seen.triu()[(classes[:, None] == classes).triu()] == 1).all()


def test_thousands_of_detections():
    """The largest tensor has the pairs of a block, and not 64 million."""
    for classes in (1, 20):
        with LargestTensor() as largest:
            keep, _ = cluster_nms(*_clustered(8000, 0, classes), 0.6, overlap="diou", voting="score")
        assert 0 < len(keep) < 8000
        assert 0 < largest.numel <= 5 * module.MAX_PAIRS  # box and score of each pair, if all overlap


def test_iou_without_voting_is_torchvisions_nms():
    boxes, scores, classes = _clustered(300, seed=7)
    keep, kept_boxes = cluster_nms(boxes, scores, classes, 0.5, overlap="iou")
    assert torch.equal(keep, batched_nms(boxes, scores, classes, 0.5))
    assert torch.equal(kept_boxes, boxes[keep])


def test_a_suppressed_box_suppresses_nothing():
    """In a chain, in which each box overlaps only its neighbours, every second one stays."""
    left = 10.0 * torch.arange(41)
    boxes = torch.stack([left, torch.zeros(41), left + 20, torch.full((41,), 20.0)], dim=1)
    keep, _ = cluster_nms(boxes, torch.linspace(1, 0.1, 41), torch.zeros(41), 0.3, overlap="iou")
    assert keep.tolist() == list(range(0, 41, 2))


@pytest.mark.parametrize("overlap, voting", VARIANTS)
def test_classes_do_not_see_each_other(overlap, voting):
    boxes = torch.tensor([[1e5, 1e5, 1e5 + 64, 1e5 + 32]]).repeat(5, 1)
    keep, voted = cluster_nms(
        boxes, torch.linspace(0.1, 0.9, 5), torch.arange(5), 0.5, overlap=overlap, voting=voting
    )
    assert keep.tolist() == [4, 3, 2, 1, 0]
    assert torch.equal(voted, boxes)


@pytest.mark.parametrize("overlap, voting", VARIANTS)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_boxes_without_area_and_scores_of_zero(overlap, voting, threshold):
    point, line, box = [5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 9.0, 5.0], [0.0, 0.0, 30.0, 30.0]
    boxes = torch.tensor([point, point, line, line, box])
    for scores in (torch.full((5,), 0.5), torch.zeros(5)):
        keep, voted = cluster_nms(boxes, scores, torch.zeros(5), threshold, overlap=overlap, voting=voting)
        assert keep.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(voted, boxes)


@pytest.mark.parametrize("overlap, voting", VARIANTS)
def test_nothing_detected(overlap, voting):
    keep, boxes = cluster_nms(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5, overlap=overlap, voting=voting
    )
    assert keep.dtype == torch.int64 and keep.shape == (0,) and boxes.shape == (0, 4)

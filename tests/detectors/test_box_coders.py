"""The box coders against their formulas, box by box."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from d2_distill.detectors.box_coders import (
    DeltaCoder,
    DistanceCoder,
    DistributionCoder,
    TwoSidedBox2BoxTransform,
)

LIMIT = math.log(1000 / 16)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decoding_matches_the_formula(weights):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(30, 4, generator=generator) * 50
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], dim=1)
    deltas = torch.randn(30, 8, generator=generator) * torch.tensor(weights * 2) * 3
    decoded = TwoSidedBox2BoxTransform(weights=weights).apply_deltas(deltas, boxes)
    for row in range(30):
        x1, y1, x2, y2 = boxes[row].tolist()
        for k in range(2):
            dx, dy, dw, dh = (d / w for d, w in zip(deltas[row, 4 * k : 4 * k + 4].tolist(), weights))
            width = (x2 - x1) * math.exp(min(max(dw, -LIMIT), LIMIT))
            height = (y2 - y1) * math.exp(min(max(dh, -LIMIT), LIMIT))
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            assert decoded[row, 4 * k : 4 * k + 4].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_differs_from_detectron2_only_below_the_lower_bound():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0]]).expand(3, 4)
    deltas = torch.tensor([[0.1, 0.2, 0.3, -0.4], [0.0, 0.0, 9.0, 9.0], [0.0, 0.0, -9.0, 0.0]])
    ours = TwoSidedBox2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)).apply_deltas(deltas, boxes)
    theirs = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)).apply_deltas(deltas, boxes)
    assert torch.equal(ours[:2], theirs[:2]) and not torch.equal(ours[2], theirs[2])
    assert TwoSidedBox2BoxTransform(weights=(1.0,) * 4).apply_deltas(deltas[:0], boxes[:0]).shape == (0, 4)


def test_encoding_inverts_decoding():
    coder = TwoSidedBox2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    boxes, targets = torch.tensor([[1.0, 2.0, 11.0, 8.0]]), torch.tensor([[3.0, 1.0, 9.0, 14.0]])
    torch.testing.assert_close(coder.apply_deltas(coder.get_deltas(boxes, targets), boxes), targets)


def _cells(seed: int, reg_max: int = 0):
    """Random outputs (2, 5, K) of five anchors of three strides, in float64."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 40
    anchors = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], dim=1)
    outputs = torch.randn(2, 5, 4 * (reg_max + 1), generator=generator, dtype=torch.float64) * 2
    return outputs, anchors, torch.tensor([8.0, 8, 16, 16, 32], dtype=torch.float64)


def _assert_boxes(actual, anchors, distances):
    """Boxes (2, 5, 4) reach the distances, in pixels, from the anchors' centres."""
    assert actual.shape == (2, 5, 4)
    for image in range(2):
        for row, (x1, y1, x2, y2) in enumerate(anchors.tolist()):
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            left, top, right, bottom = distances(image, row)
            expected = [x - left, y - top, x + right, y + bottom]
            assert actual[image, row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("activation", ["exp", "relu"])
def test_distances(activation):
    outputs, anchors, strides = _cells(seed=1)

    def distances(image, row):
        values = outputs[image, row].tolist()
        if activation == "exp":
            return [math.exp(value) for value in values]
        return [max(value, 0) * strides[row].item() for value in values]

    coder = DistanceCoder(activation)
    _assert_boxes(coder.decode(outputs, anchors, strides), anchors, distances)
    assert coder.box_dim == 4
    assert coder.decode(outputs[0, :0], anchors[:0], strides[:0]).shape == (0, 4)


@pytest.mark.parametrize("reg_max", [16, 7])
def test_distributions(reg_max):
    outputs, anchors, strides = _cells(seed=2, reg_max=reg_max)

    def distances(image, row):
        logits, means = outputs[image, row].tolist(), []
        for edge in range(4):
            weights = [math.exp(logits[edge * (reg_max + 1) + k]) for k in range(reg_max + 1)]
            means.append(sum(k * weight for k, weight in enumerate(weights)) / sum(weights))
        return [mean * strides[row].item() for mean in means]

    coder = DistributionCoder(reg_max)
    assert coder.box_dim == outputs.shape[-1]
    _assert_boxes(coder.decode(outputs, anchors, strides), anchors, distances)
    assert coder.decode(outputs[0, :0], anchors[:0], strides[:0]).shape == (0, 4)


def test_distributions_span_their_bins():
    coder = DistributionCoder(16)
    logits = torch.full((3, 4, 17), -1e4)
    logits[0, :, 0] = logits[1, :, 16] = 0
    logits[2] = 0
    assert coder.distances(logits.flatten(1)).tolist() == [[0] * 4, [16] * 4, [8] * 4]


def test_distances_keep_single_precision_under_autocast():
    outputs, anchors, strides = (x.float() for x in _cells(seed=3, reg_max=16))
    half = outputs.bfloat16()
    expected = DistributionCoder(16).decode(half.float(), anchors, strides)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DistributionCoder(16).decode(half, anchors, strides), expected)


def test_targets_lie_where_both_neighbouring_bins_exist():
    coder = DistributionCoder(16)
    targets = coder.targets(torch.tensor([-3.0, 0.0, 7.25, 15.9, 15.95, 400.0]))
    torch.testing.assert_close(targets, torch.tensor([0.0, 0.0, 7.25, 15.9, 15.9, 15.9]))
    assert targets.floor().max() + 1 <= 16


def test_deltas_of_a_batch():
    """(N, R, 4) of R anchors, as image by image; encoding inverts it."""
    deltas, anchors, strides = (x.float() for x in _cells(seed=4))
    coder = DeltaCoder((10.0, 10.0, 5.0, 5.0))
    boxes = coder.decode(deltas, anchors, strides)
    for image in range(2):
        expected = coder.transform.apply_deltas(deltas[image], anchors)
        assert torch.equal(boxes[image], expected)
        torch.testing.assert_close(coder.encode(boxes[image], anchors), deltas[image], rtol=1e-3, atol=1e-3)
    assert coder.box_dim == 4


def test_gradients():
    for coder, reg_max in ((DistanceCoder("exp"), 0), (DistanceCoder("relu"), 0), (DistributionCoder(5), 5)):
        outputs, anchors, strides = _cells(seed=5, reg_max=reg_max)
        outputs.requires_grad_()
        boxes = coder.decode(outputs, anchors, strides)
        (gradient,) = torch.autograd.grad((boxes * torch.arange(4)).sum(), outputs)
        step = 1e-2
        for index in ((0, 1, 0), (1, 4, outputs.shape[-1] - 1)):
            moved = outputs.detach().clone()
            moved[index] += step
            difference = (coder.decode(moved, anchors, strides) - boxes.detach()) * torch.arange(4)
            assert gradient[index].item() == pytest.approx(difference.sum().item() / step, rel=0.05, abs=1e-2)

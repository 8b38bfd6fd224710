"""The box coder against the formula, box by box."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from d2_distill.detectors.box_coder import TwoSidedBox2BoxTransform

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

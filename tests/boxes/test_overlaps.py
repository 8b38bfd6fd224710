"""Pairwise overlaps against a slow form with loops and scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou, distance_box_iou

from d2_distill.boxes.overlaps import MODES, pairwise_overlaps


def _boxes(*shape: int, seed: int) -> torch.Tensor:
    corners = 5 * torch.rand(*shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)


def _slow(a, b, mode: str) -> float:
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area = (a[2] - a[0]) * (a[3] - a[1])
    union = area + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    overlap = intersection / (area if mode in ("iof", "iof_diou") else union)
    if mode in ("iou", "iof"):
        return overlap
    rho = math.hypot((a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2)
    c = math.hypot(max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    return overlap - (rho / c) ** 2


@pytest.mark.parametrize("mode", MODES)
def test_matches_scalar_form(mode):
    boxes1, boxes2 = _boxes(2, 7, seed=0), _boxes(2, 5, seed=1)
    overlaps = pairwise_overlaps(boxes1, boxes2, mode)
    assert overlaps.shape == (2, 7, 5)
    for image in range(2):
        expected = [[_slow(a, b, mode) for b in boxes2[image].tolist()] for a in boxes1[image].tolist()]
        torch.testing.assert_close(overlaps[image], torch.tensor(expected, dtype=torch.float64))


def test_agrees_with_torchvision():
    boxes1, boxes2 = _boxes(30, seed=2), _boxes(20, seed=3)
    torch.testing.assert_close(pairwise_overlaps(boxes1, boxes2, "iou"), box_iou(boxes1, boxes2))
    torch.testing.assert_close(
        pairwise_overlaps(boxes1, boxes2, "diou"), distance_box_iou(boxes1, boxes2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions_are_broadcast_and_the_input_is_kept(mode):
    anchors, boxes = _boxes(6, seed=4).requires_grad_(), _boxes(3, 2, seed=5)
    before = anchors.detach().clone(), boxes.clone()
    overlaps = pairwise_overlaps(anchors, boxes, mode)
    assert overlaps.shape == (3, 6, 2) and not overlaps.requires_grad
    assert torch.equal(anchors, before[0]) and torch.equal(boxes, before[1])
    for image in range(3):
        assert torch.equal(overlaps[image], pairwise_overlaps(anchors, boxes[image], mode))


@pytest.mark.parametrize("mode", MODES)
def test_degenerate_boxes_are_finite(mode):
    """No area, one pixel, turned inside out; in single precision."""
    boxes = torch.tensor([[0.0, 0, 0, 0], [3, 3, 4, 4], [5, 5, 2, 2], [0, 0, 1e4, 1e4], [3, 3, 3, 9]])
    overlaps = pairwise_overlaps(boxes, boxes, mode)
    assert overlaps.isfinite().all()
    assert overlaps[1, 1] == 1 and overlaps[3, 3] == 1
    assert overlaps[0, 0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_no_boxes(mode):
    assert pairwise_overlaps(torch.zeros(2, 0, 4), _boxes(3, seed=6).float(), mode).shape == (2, 0, 3)
    assert pairwise_overlaps(_boxes(3, seed=6), torch.zeros(2, 0, 4).double(), mode).shape == (2, 3, 0)


def test_unknown_mode():
    with pytest.raises(ValueError, match="'giou'.*iof_diou"):
        pairwise_overlaps(torch.zeros(1, 4), torch.zeros(1, 4), "giou")

"""IoU losses against slow forms with loops and scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.losses import BOX_LOSSES, ciou_loss, diou_loss, giou_loss, linear_iou_loss, log_iou_loss

ALL = pytest.mark.parametrize("loss", BOX_LOSSES.values(), ids=BOX_LOSSES)


def _boxes(n: int, seed: int, size: float = 4.0) -> torch.Tensor:
    corners = torch.rand(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 0.1], dim=1)


def _areas(a, b):
    """Intersection, union and enclosing area."""
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter, union, (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))


def _slow_diou(a, b, eps=1e-6):
    inter, union, _ = _areas(a, b)
    rho = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    c = math.hypot(max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    return inter / (union + eps), rho**2 / (c**2 + eps)


def _slow_ciou(a, b, eps=1e-6):
    iou, distance = _slow_diou(a, b)
    angles = [math.atan((x[2] - x[0]) / (x[3] - x[1] + eps)) for x in (a, b)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
    return 1 - (iou - (distance + v / (1 - iou + v) * v))


def test_losses_match_scalar_form():
    boxes, targets = _boxes(40, seed=9), _boxes(40, seed=10)
    actual = {name: loss(boxes, targets).tolist() for name, loss in BOX_LOSSES.items()}
    for i, (a, b) in enumerate(zip(boxes.tolist(), targets.tolist())):
        inter, union, hull = _areas(a, b)
        iou = inter / union
        assert actual["giou"][i] == pytest.approx(1 - iou + (hull - union) / hull, rel=1e-9)
        assert actual["iou"][i] == pytest.approx(-math.log(max(iou, 1e-6)), rel=1e-9)
        assert actual["linear_iou"][i] == pytest.approx(1 - iou, rel=1e-9)
        iou, distance = _slow_diou(a, b)
        assert actual["diou"][i] == pytest.approx(1 - iou + distance, rel=1e-9)
        assert actual["ciou"][i] == pytest.approx(_slow_ciou(a, b), rel=1e-9)


def test_offset_matches_scalar_form():
    boxes, targets = _boxes(40, seed=13), _boxes(40, seed=14)
    losses = (giou_loss, log_iou_loss, linear_iou_loss)
    giou, log_iou, linear = (loss(boxes, targets, offset=1.0).tolist() for loss in losses)
    for i, (a, b) in enumerate(zip(boxes.tolist(), targets.tolist())):
        inter, union, hull = _areas(a, b)
        iou = (inter + 1) / (union + 1)
        assert giou[i] == pytest.approx(1 - (iou - (hull - union) / hull), rel=1e-9)
        assert log_iou[i] == pytest.approx(-math.log(iou), rel=1e-9)
        assert linear[i] == pytest.approx(1 - iou, rel=1e-9)


@ALL
def test_gradients(loss):
    targets = _boxes(6, seed=12)
    boxes = (targets + _boxes(6, seed=11) / 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (boxes,))


@pytest.mark.parametrize("loss", [giou_loss, diou_loss, ciou_loss])
def test_gradients_of_disjoint_boxes(loss):
    """Unlike those of the IoU alone they are not zero."""
    boxes, targets = _boxes(6, seed=15).requires_grad_(), _boxes(6, seed=16) + 20
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (boxes,))
    (gradient,) = torch.autograd.grad(loss(boxes, targets).sum(), boxes)
    assert gradient.any(dim=1).all()


@ALL
def test_leading_dimensions_are_broadcast(loss):
    boxes, targets = _boxes(6, seed=17), _boxes(5, seed=18)
    pairs = loss(boxes[:, None], targets)
    assert pairs.shape == (6, 5)
    for i in range(6):
        torch.testing.assert_close(pairs[i], loss(boxes[i].expand(5, 4), targets))


@ALL
def test_degenerate_boxes(loss):
    """Boxes of no area, disjoint, turned inside out and equal: the loss and its gradient stay finite."""
    pairs = torch.tensor(
        [
            [[1.0, 1, 1, 1], [1, 1, 1, 1]],
            [[0, 0, 1, 1], [8, 8, 9, 9]],
            [[5, 5, 3, 3], [3, 3, 5, 5]],
            [[0, 0, 2, 2], [0, 0, 2, 2]],
            [[0, 0, 90, 50], [0, 0, 90, 50]],
            [[3, 3, 3, 9], [3, 3, 9, 3]],
        ]
    )
    boxes, targets = pairs[:, 0].requires_grad_(), pairs[:, 1]
    values = loss(boxes, targets)
    values.sum().backward()
    assert values.isfinite().all() and boxes.grad.isfinite().all()
    assert values[3:5].tolist() == pytest.approx([0, 0], abs=1e-6)
    disjoint = {giou_loss: 1 + 79 / 81, log_iou_loss: -math.log(1e-6), linear_iou_loss: 1.0}
    assert values[1].item() == pytest.approx(disjoint.get(loss, 1 + 128 / 162), rel=1e-4)


@ALL
def test_empty_input(loss):
    empty = torch.zeros(0, 4, requires_grad=True)
    values = loss(empty, torch.zeros(0, 4))
    values.sum().backward()
    assert values.shape == (0,) and empty.grad.shape == (0, 4)

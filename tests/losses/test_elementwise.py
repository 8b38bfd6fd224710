"""Element-wise losses against slow forms with loops and scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.losses import giou_loss, kd_kl_div_loss, kd_quality_focal_loss, log_iou_loss


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _boxes(n: int, seed: int, size: float = 4.0) -> torch.Tensor:
    corners = torch.rand(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 0.1], dim=1)


@pytest.mark.parametrize("beta", [1, 1.5, 2])
def test_kd_quality_focal_matches_scalar_form(beta):
    logits, teacher = _random(6, 3, seed=1, scale=2), _random(6, 3, seed=2, scale=2)
    loss = kd_quality_focal_loss(logits, teacher, beta=beta)
    for i in range(6):
        for k in range(3):
            p, y = _sigmoid(logits[i, k].item()), _sigmoid(teacher[i, k].item())
            expected = -(y * math.log(p) + (1 - y) * math.log(1 - p)) * abs(p - y) ** beta
            assert loss[i, k].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [1, 2])
def test_kd_quality_focal_gradients(beta):
    logits, teacher = _random(4, 3, seed=3).requires_grad_(), _random(4, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kd_quality_focal_loss(x, teacher.detach(), beta=beta), (logits,)
    )
    kd_quality_focal_loss(logits, teacher, beta=beta).sum().backward()
    assert teacher.grad is None


def test_kd_quality_focal_is_zero_and_flat_at_the_teacher():
    logits = _random(5, 2).requires_grad_()
    loss = kd_quality_focal_loss(logits, logits.detach())
    loss.sum().backward()
    assert not loss.any() and not logits.grad.any()


def test_kd_quality_focal_is_finite_for_extreme_logits():
    logits = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    loss = kd_quality_focal_loss(logits, torch.tensor([200.0, -200.0, 500.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("class_reduction", ["sum", "mean"])
def test_kl_div_matches_scalar_form(temperature, class_reduction):
    logits, teacher = _random(4, 5, seed=5), _random(4, 5, seed=6)
    loss = kd_kl_div_loss(logits, teacher, temperature=temperature, class_reduction=class_reduction)
    for i in range(4):
        q = [math.exp(x / temperature) for x in teacher[i].tolist()]
        p = [math.exp(x / temperature) for x in logits[i].tolist()]
        terms = [a / sum(q) * math.log(a / sum(q) / (b / sum(p))) for a, b in zip(q, p)]
        expected = sum(terms) * temperature**2 / (5 if class_reduction == "mean" else 1)
        assert loss[i].item() == pytest.approx(expected, rel=1e-9)


def test_kl_div_gradient_and_bad_reduction():
    logits, teacher = _random(3, 4, seed=7).requires_grad_(), _random(3, 4, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kd_kl_div_loss(x, teacher.detach(), temperature=2.0), (logits,))
    kd_kl_div_loss(logits, teacher).sum().backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match="'max'"):
        kd_kl_div_loss(logits, teacher, class_reduction="max")


def _slow_iou(a, b):
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union, (hull - union) / hull


def test_iou_losses_match_scalar_form():
    boxes, targets = _boxes(40, seed=9), _boxes(40, seed=10)
    giou, log_iou = giou_loss(boxes, targets), log_iou_loss(boxes, targets)
    for i in range(40):
        iou, excess = _slow_iou(boxes[i].tolist(), targets[i].tolist())
        assert giou[i].item() == pytest.approx(1 - iou + excess, rel=1e-6)
        assert log_iou[i].item() == pytest.approx(-math.log(max(iou, 1e-6)), abs=1e-6)


def test_iou_losses_gradients():
    boxes, targets = _boxes(6, seed=11).requires_grad_(), _boxes(6, seed=12) + 0.05
    assert torch.autograd.gradcheck(lambda x: giou_loss(x, targets), (boxes,))
    overlapping = (targets + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_iou_loss(x, targets), (overlapping,))


@pytest.mark.parametrize("loss", [giou_loss, log_iou_loss])
def test_iou_losses_on_degenerate_boxes(loss):
    """Boxes of no area, disjoint and turned inside out: the loss and its gradient stay finite."""
    boxes = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 1], [5, 5, 3, 3], [0, 0, 2, 2]], requires_grad=True)
    targets = torch.tensor([[1.0, 1, 1, 1], [8, 8, 9, 9], [3, 3, 5, 5], [0, 0, 2, 2]])
    values = loss(boxes, targets)
    values.sum().backward()
    assert values.isfinite().all() and boxes.grad.isfinite().all()
    assert values[3].item() == pytest.approx(0, abs=1e-6)
    assert values[1].item() == pytest.approx(1 + 79 / 81 if loss is giou_loss else -math.log(1e-6), rel=1e-4)


@pytest.mark.parametrize(
    "loss, width", [(kd_quality_focal_loss, 3), (kd_kl_div_loss, 5), (giou_loss, 4), (log_iou_loss, 4)]
)
def test_empty_input(loss, width):
    empty = torch.zeros(0, width, requires_grad=True)
    values = loss(empty, torch.zeros(0, width))
    assert len(values) == 0 and values.sum() == 0 and values.requires_grad

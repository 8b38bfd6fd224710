"""Element-wise losses and their targets against slow forms with loops and scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from d2_distill.losses import centerness_targets, distribution_focal_loss, kd_kl_div_loss, quality_focal_loss


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [1, 1.5, 2, 2.0])
@pytest.mark.parametrize("from_logits", [True, False])
def test_quality_focal_matches_scalar_form(beta, from_logits):
    logits, targets = _random(6, 3, seed=1, scale=2), _random(6, 3, seed=2, scale=2).sigmoid()
    predictions = logits if from_logits else logits.sigmoid()
    loss = quality_focal_loss(predictions, targets, beta, from_logits=from_logits)
    for i in range(6):
        for k in range(3):
            p, y = _sigmoid(logits[i, k].item()), targets[i, k].item()
            expected = -(y * math.log(p) + (1 - y) * math.log(1 - p)) * abs(p - y) ** beta
            assert loss[i, k].item() == pytest.approx(expected, rel=1e-9)


def test_quality_focal_is_the_published_form_of_two_cases():
    """Background and the other classes cost -log(1 - p) * p ** 2, only the true class knows a quality."""
    logits, quality = _random(8, 4, seed=3), torch.rand(8, dtype=torch.float64)
    labels = [0, 4, 2, 3, 4, 1, 4, 0]  # 4: background
    targets = (F.one_hot(torch.tensor(labels), 5) * quality[:, None])[:, :4]
    loss = quality_focal_loss(logits, targets)
    for i, label in enumerate(labels):
        for k in range(4):
            p, q = _sigmoid(logits[i, k].item()), quality[i].item()
            expected = -math.log(1 - p) * p**2
            if k == label:
                expected = -(q * math.log(p) + (1 - q) * math.log(1 - p)) * (q - p) ** 2
            assert loss[i, k].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [1, 1.5, 2])
@pytest.mark.parametrize("from_logits", [True, False])
def test_quality_focal_gradient(beta, from_logits):
    predictions, targets = _random(4, 3, seed=3), _random(4, 3, seed=4).sigmoid()
    predictions = (predictions if from_logits else predictions.sigmoid()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: quality_focal_loss(x, targets, beta, from_logits=from_logits), (predictions,)
    )


@pytest.mark.parametrize("beta", [1, 1.5, 2])
def test_quality_focal_is_zero_and_flat_at_the_target(beta):
    logits = _random(5, 2).requires_grad_()
    loss = quality_focal_loss(logits, logits.detach().sigmoid(), beta)
    loss.sum().backward()
    assert not loss.any() and not logits.grad.any()


def test_quality_focal_is_finite_for_extreme_logits():
    logits = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([1.0, 0.0, 1.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert loss.tolist() == pytest.approx([200, 200, math.log(2) / 4])


def test_quality_focal_of_saturated_probabilities_is_finite_and_a_nan_stays_one():
    """The logarithms are clamped as in PyTorch's binary cross entropy."""
    probabilities = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-42, 0.25], requires_grad=True)
    targets = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 1.0])
    loss = quality_focal_loss(probabilities, targets, from_logits=False)
    loss.sum().backward()
    expected = F.binary_cross_entropy(probabilities, targets, reduction="none")
    torch.testing.assert_close(loss, expected * (probabilities - targets) ** 2)
    assert probabilities.grad.isfinite().all() and probabilities.grad[-1] < 0
    assert quality_focal_loss(torch.tensor(float("nan")), torch.tensor(0.0), from_logits=False).isnan()


def test_quality_focal_of_half_precision_logits():
    logits, targets = _random(20, 3, seed=5).half(), _random(20, 3, seed=6).sigmoid().float()
    loss = quality_focal_loss(logits, targets)
    expected = quality_focal_loss(logits.float(), targets)
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("shape", [(7,), (2, 5, 4)])
def test_distribution_focal_matches_scalar_form(shape):
    logits = _random(*shape, 9, seed=7)
    targets = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) * 7.9
    targets.view(-1)[:3] = torch.tensor([0.0, 3.0, 7.9])
    loss = distribution_focal_loss(logits, targets)
    assert loss.shape == shape
    for row, y, actual in zip(logits.view(-1, 9).tolist(), targets.view(-1).tolist(), loss.view(-1).tolist()):
        normalizer = math.log(sum(math.exp(x) for x in row))
        low = int(y)
        expected = (normalizer - row[low]) * (low + 1 - y) + (normalizer - row[low + 1]) * (y - low)
        assert actual == pytest.approx(expected, rel=1e-9)


def test_distribution_focal_gradient():
    logits = _random(5, 6, seed=9).requires_grad_()
    targets = torch.tensor([0.0, 4.9, 2.5, 1.25, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, targets), (logits,))


def test_distribution_focal_is_least_where_the_two_bins_average_to_the_target():
    logits = torch.tensor([-1e9, math.log(0.75), math.log(0.25), -1e9], requires_grad=True)
    (gradient,) = torch.autograd.grad(distribution_focal_loss(logits, torch.tensor(1.25)), logits)
    assert gradient.abs().max() < 1e-6


def test_distribution_focal_refuses_a_target_without_upper_bin():
    with pytest.raises(RuntimeError, match="out of bounds"):
        distribution_focal_loss(torch.zeros(1, 5), torch.tensor([4.0]))


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


def test_kl_div_of_single_precision_bins_at_a_high_temperature():
    """At T = 10 the divergences are tiny differences of logarithms; float32 must not lose them."""
    logits, teacher = _random(200, 17, seed=9, scale=2), _random(200, 17, seed=10, scale=2)
    exact = kd_kl_div_loss(logits, teacher, temperature=10.0, class_reduction="mean")
    single = kd_kl_div_loss(logits.float(), teacher.float(), temperature=10.0, class_reduction="mean")
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)


def test_centerness_matches_scalar_form():
    distances = torch.rand(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(11)) * 9
    targets = centerness_targets(distances)
    assert targets.shape == (3, 5)
    for (left, top, right, bottom), actual in zip(distances.view(-1, 4).tolist(), targets.view(-1).tolist()):
        expected = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        assert actual == pytest.approx(math.sqrt(expected), rel=1e-9)


def test_centerness_at_the_edges():
    distances = torch.tensor(
        [[2.0, 3, 2, 3], [0, 0, 0, 0], [0, 1, 2, 1], [-1, 1, 2, 1], [-1, -1, 2, 2], [-3, 1, -2, 1]]
    )
    assert centerness_targets(distances).tolist() == [1, 0, 0, 0, 0, 0]
    assert centerness_targets(torch.tensor([1e-30, 1, 1e-30, 1])) == 1
    assert centerness_targets(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("loss, width", [(quality_focal_loss, 3), (kd_kl_div_loss, 5)])
def test_empty_input(loss, width):
    empty = torch.zeros(0, width, requires_grad=True)
    values = loss(empty, torch.zeros(0, width))
    assert len(values) == 0 and values.sum() == 0 and values.requires_grad


def test_empty_distributions():
    empty = torch.zeros(0, 4, 17, requires_grad=True)
    values = distribution_focal_loss(empty, torch.zeros(0, 4))
    values.sum().backward()
    assert values.shape == (0, 4) and empty.grad.shape == empty.shape

"""Logits of the geometric mean of two probabilities."""

from __future__ import annotations

import pytest
import torch

from d2_distill.layers.joint_logits import joint_logits


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By its definition, log(s / (1 - s)) with s = exp(-h), in float64."""
    h = (torch.nn.functional.softplus(-a, threshold=700) + torch.nn.functional.softplus(-b, threshold=700)) / 2
    return -h - (-torch.expm1(-h)).log()


def test_against_the_definition():
    """Also where a mean in float32 would be 0 or 1."""
    values = torch.linspace(-60, 60, 97)
    a, b = torch.meshgrid(values, values, indexing="ij")
    torch.testing.assert_close(joint_logits(a, b).double(), exact(a.double(), b.double()), rtol=1e-6, atol=1e-5)


def test_the_sigmoid_is_the_mean():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5) * 4, torch.randn(2, 1, 4, 5) * 4
    mean = (a.sigmoid() * b.sigmoid()).sqrt()
    torch.testing.assert_close(joint_logits(a, b).sigmoid(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joint_logits(a, a), a)


def test_gradients():
    torch.manual_seed(1)
    pair = [(torch.randn(30) * 6).requires_grad_() for _ in range(2)]
    double = [x.detach().double().requires_grad_() for x in pair]
    for ours, theirs in zip(
        torch.autograd.grad(joint_logits(*pair).sum(), pair), torch.autograd.grad(exact(*double).sum(), double)
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("a", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("b", [-1e4, 0.0, 1e4])
def test_nothing_overflows(a, b):
    pair = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    logit = joint_logits(*pair)
    assert logit.isfinite() and all(x.isfinite() for x in torch.autograd.grad(logit, pair))


def test_half_precision_is_raised():
    with torch.autocast("cpu", torch.bfloat16):
        logits = joint_logits(torch.tensor([1.0]).bfloat16(), torch.tensor([-2.0]).bfloat16())
    torch.testing.assert_close(logits, joint_logits(torch.tensor([1.0]), torch.tensor([-2.0])))

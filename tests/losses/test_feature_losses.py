"""Alignment and Pearson loss against loops over channels, and at the edges where the reference gives nan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2_distill.losses import align_statistics, pearson_loss


def _maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _values(features: torch.Tensor, channel: int) -> list:
    return [v for image in features for row in image[channel] for v in row.tolist()]


def _mean_and_std(values: list):
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def test_align_matches_a_loop():
    student, teacher = _maps(2, 3, 4, 5, seed=0), 3 * _maps(1, 3, 2, 6, seed=1) + 7
    aligned = align_statistics(student, teacher)
    for channel in range(3):
        mean, std = _mean_and_std(_values(student, channel))
        teacher_mean, teacher_std = _mean_and_std(_values(teacher, channel))
        expected = [(v - mean) / (std + 1e-6) * teacher_std + teacher_mean for v in _values(student, channel)]
        assert _values(aligned, channel) == pytest.approx(expected, rel=1e-9)


def test_align_gradient_reaches_the_student_only():
    student, teacher = _maps(2, 2, 2, 3, seed=2).requires_grad_(), _maps(2, 2, 2, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: align_statistics(x, teacher.detach()), (student,))
    align_statistics(student, teacher).square().sum().backward()
    assert student.grad.any() and teacher.grad is None


def test_align_ignores_scale_and_shift_of_the_student():
    student, teacher = _maps(2, 3, 4, 4, seed=4), _maps(2, 3, 4, 4, seed=5)
    torch.testing.assert_close(
        align_statistics(5 * student - 2, teacher), align_statistics(student, teacher), rtol=1e-5, atol=1e-5
    )


def test_pearson_matches_a_loop():
    student, teacher = _maps(2, 3, 4, 5, seed=6), _maps(2, 3, 4, 5, seed=7)
    correlations = []
    for channel in range(3):
        a, b = _values(student, channel), _values(teacher, channel)
        (mean_a, std_a), (mean_b, std_b) = _mean_and_std(a), _mean_and_std(b)
        products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
        correlations.append(products / (len(a) - 1) / (std_a * std_b))
    expected = 39 / 40 * sum(1 - r for r in correlations) / 3
    assert pearson_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_pearson_gradient_and_invariance():
    student, teacher = _maps(2, 2, 2, 3, seed=8).requires_grad_(), _maps(2, 2, 2, 3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pearson_loss(x, teacher.detach()), (student,))
    loss = pearson_loss(student, teacher)
    loss.backward()
    assert teacher.grad is None
    assert pearson_loss(4 * student + 3, 2 * teacher - 5).item() == pytest.approx(loss.item(), rel=1e-4)
    assert pearson_loss(teacher, teacher).item() == 0


def test_pearson_resizes_the_map_that_it_is_told_to():
    student, teacher = _maps(2, 3, 4, 4, seed=10), _maps(2, 3, 8, 6, seed=11)
    larger = F.interpolate(student, size=(8, 6), mode="bilinear", align_corners=False)
    smaller = F.interpolate(teacher, size=(4, 4), mode="bilinear", align_corners=False)
    assert pearson_loss(student, teacher, resize="student") == pearson_loss(larger, teacher)
    assert pearson_loss(student, teacher, resize="teacher") == pearson_loss(student, smaller)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 3, 8, 6\)"):
        pearson_loss(student, teacher)
    with pytest.raises(ValueError, match="differ in shape"):
        pearson_loss(student, _maps(2, 5, 4, 4, seed=12), resize="student")


def test_one_value_a_channel_is_finite():
    """One image whose coarsest map is 1x1: an unbiased deviation does not exist."""
    student, teacher = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 3, 1, 1)
    aligned = align_statistics(student, teacher)
    assert torch.equal(aligned, teacher)
    loss = pearson_loss(student, teacher) + aligned.sum()
    loss.backward()
    assert pearson_loss(student, teacher) == 0 and not student.grad.any()


def test_constant_channel_is_finite():
    student = torch.randn(2, 2, 3, 3)
    student[:, 1] = 0
    student.requires_grad_()
    teacher = torch.randn(2, 2, 3, 3)
    loss = pearson_loss(student, teacher) + align_statistics(student, teacher).square().sum()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_statistics_of_half_precision_maps_are_single_precision():
    student, teacher = torch.randn(1, 2, 64, 64).half() * 100, torch.randn(1, 2, 64, 64).half()
    aligned = align_statistics(student, teacher)
    assert aligned.dtype == torch.float32 and aligned.isfinite().all()
    assert pearson_loss(student, teacher).isfinite()

"""The focal loss that treats positives as a correction, against fvcore's with one-hot targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss

from d2_distill.losses import focal_loss_sum

IMAGES, ANCHORS, CLASSES = 2, 300, 5


def _scene(seed: int, num_positives: int, scale: float = 4.0):
    """Logits, labels with ignored anchors (-1), and the indices of the positives."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(IMAGES, ANCHORS, CLASSES, generator=generator)
    labels = torch.full((IMAGES, ANCHORS), CLASSES)
    labels[:, ::7] = -1
    places = torch.randperm(IMAGES * ANCHORS, generator=generator)[:num_positives]
    labels.view(-1)[places] = torch.randint(CLASSES, (num_positives,), generator=generator)
    rows = ((labels >= 0) & (labels < CLASSES)).nonzero(as_tuple=True)
    return logits, labels, (*rows, labels[rows])


def _expected(logits, labels, alpha: float, gamma: float):
    """Value and gradient."""
    logits = logits.double().requires_grad_()
    valid = labels >= 0
    targets = F.one_hot(labels[valid], CLASSES + 1)[:, :-1].double()
    loss = sigmoid_focal_loss(logits[valid], targets, alpha=alpha, gamma=gamma, reduction="sum")
    return loss.detach().double(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("num_positives", [0, 1, 40, IMAGES * ANCHORS])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 1.5), (-1, 0.0), (1.0, 1.0)])
def test_it_is_fvcores(num_positives, alpha, gamma):
    logits, labels, positives = _scene(0, num_positives)
    expected, expected_gradient = _expected(logits, labels, alpha, gamma)
    logits.requires_grad_()
    loss = focal_loss_sum(logits, positives, labels >= 0, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0].double(), expected_gradient, rtol=1e-4, atol=1e-6
    )


def test_extreme_logits_are_finite():
    logits, labels, positives = _scene(1, 40, scale=80.0)
    logits.requires_grad_()
    loss = focal_loss_sum(logits, positives, labels >= 0, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(loss.double(), _expected(logits.detach(), labels, 0.25, 2.0)[0], rtol=1e-5, atol=1e-4)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()

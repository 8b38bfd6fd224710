"""FGD's masks and attention against the paper's formulas, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch

from d2_distill.regions import feature_energy, focal_masks, spatial_attention


def _slow_masks(boxes, size, stride):
    """Foreground and background of one image as nested lists."""
    height, width = size
    smallest = [[None] * width for _ in range(height)]
    for x0, y0, x1, y1 in boxes:
        cells = [
            (i, j)
            for i in range(height)
            for j in range(width)
            if x0 < (j + 1) * stride and x1 > j * stride and y0 < (i + 1) * stride and y1 > i * stride
        ]
        for i, j in cells:
            smallest[i][j] = min(len(cells), smallest[i][j] or len(cells))
    background = sum(count is None for row in smallest for count in row)
    return (
        [[1 / count if count else 0.0 for count in row] for row in smallest],
        [[0.0 if count else 1 / background for count in row] for row in smallest],
    )


@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_slow_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 5, 2, 2, generator=generator) * torch.tensor([64.0, 48.0])
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)
    boxes[0, 0] = torch.tensor([8.0, 16.0, 24.0, 32.0])  # its sides lie on those of cells
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    foreground, background = focal_masks(boxes, valid, (6, 8), 8)
    for image in range(2):
        expected = _slow_masks(boxes[image][valid[image]].tolist(), (6, 8), 8)
        torch.testing.assert_close(foreground[image], torch.tensor(expected[0]))
        torch.testing.assert_close(background[image], torch.tensor(expected[1]))


def test_every_object_and_the_background_weigh_one():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [32, 16, 60, 40]]])
    foreground, background = focal_masks(boxes, torch.ones(1, 2, dtype=torch.bool), (6, 8), 8)
    assert foreground.sum() == pytest.approx(2) and background.sum() == pytest.approx(1)


def test_no_object_and_no_background():
    nothing = focal_masks(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool), (2, 3), 8)
    assert not nothing[0].any() and torch.allclose(nothing[1], torch.tensor(1 / 6))
    everything = focal_masks(torch.tensor([[[-5.0, -5, 99, 99]]]), torch.ones(1, 1, dtype=torch.bool), (2, 3), 8)
    assert torch.allclose(everything[0], torch.tensor(1 / 6)) and not everything[1].any()


def test_attention_equals_a_slow_one():
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = spatial_attention(features, temperature=0.7)
    for image in range(2):
        energy = [
            [sum(abs(features[image, c, i, j].item()) for c in range(3)) / 3 for j in range(5)] for i in range(4)
        ]
        torch.testing.assert_close(feature_energy(features)[image], torch.tensor(energy))
        total = sum(math.exp(x / 0.7) for row in energy for x in row)
        expected = torch.tensor([[20 * math.exp(x / 0.7) / total for x in row] for row in energy])
        torch.testing.assert_close(found[image], expected)
    assert found.mean(dim=(1, 2)).tolist() == pytest.approx([1, 1])

"""Anchors and padded ground truth for the tests of assigners and regions, with boxes of the odd kinds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from d2_distill.assigners import GroundTruth

SIZE = 96
STRIDES = (8, 16, 32)


class Scene(NamedTuple):
    anchors: torch.Tensor
    level_sizes: list[int]
    strides: torch.Tensor
    gt: GroundTruth
    valid_anchors: torch.Tensor | None


def _anchors(per_cell: int):
    levels = []
    for stride in STRIDES:
        steps = torch.arange(0, SIZE, stride, dtype=torch.float64)
        centers = torch.cartesian_prod(steps, steps).flip(dims=[1])[:, None]
        # Anchors of a cell have not quite the same centre: which of equally near ones are taken is open.
        number = torch.arange(per_cell, dtype=torch.float64)[:, None]
        centers = centers + 0.01 * number
        half = 4 * stride * 2 ** (number / per_cell) * torch.tensor([1, 0.8], dtype=torch.float64)
        levels.append(torch.cat([centers - half, centers + half], dim=-1).flatten(0, 1))
    return levels


def _boxes(generator: torch.Generator, number: int) -> torch.Tensor:
    corner = torch.rand(number, 2, generator=generator, dtype=torch.float64) * SIZE * 0.9
    side = 2 + torch.rand(number, 2, generator=generator, dtype=torch.float64) ** 2 * SIZE * 0.7
    return torch.cat([corner, corner + side], dim=1)


# Of a single pixel, of no size, beside all anchors; twice the same; all over the image.
ODD = torch.tensor(
    [
        [40.2, 40.3, 41.2, 41.3],
        [50.1, 50.7, 50.1, 50.7],
        [900.3, 900.2, 950.9, 930.4],
        [20.3, 10.9, 60.1, 70.7],
        [20.3, 10.9, 60.1, 70.7],
        [0.3, 0.7, 95.2, 95.9],
    ],
    dtype=torch.float64,
)


def build(seed: int, counts=(5, 0, 6, 2), per_cell: int = 1, some_invalid: bool = False) -> Scene:
    """Images of ``counts`` boxes; the third has the odd ones if it has any."""
    generator = torch.Generator().manual_seed(seed)
    levels = _anchors(per_cell)
    anchors, level_sizes = torch.cat(levels), [len(level) for level in levels]
    strides = torch.tensor(STRIDES, dtype=torch.float64).repeat_interleave(torch.tensor(level_sizes))
    most, images = max(counts), len(counts)
    boxes = torch.zeros(images, most, 4, dtype=torch.float64)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    for image, count in enumerate(counts):
        odd = ODD[:count] if image == 2 else ODD[:0]
        boxes[image, :count] = torch.cat([odd, _boxes(generator, count - len(odd))])
    classes = torch.randint(0, 7, (images, most), generator=generator) * valid
    valid_anchors = None
    if some_invalid:
        valid_anchors = torch.rand(images, len(anchors), generator=generator) < 0.7
        valid_anchors[0, sum(level_sizes[:-1]) :] = False  # a whole level
        valid_anchors[3] = False  # a whole image
    return Scene(anchors, level_sizes, strides, GroundTruth(boxes, classes, valid), valid_anchors)


# Keyword arguments of :func:`build`.
SCENES: dict[str, dict] = {
    "plain": {"seed": 0},
    "other": {"seed": 1, "counts": (1, 3, 6, 9)},
    "several anchors a cell": {"seed": 2, "per_cell": 3},
    "some anchors invalid": {"seed": 3, "some_invalid": True},
    "both": {"seed": 4, "per_cell": 2, "some_invalid": True},
    "no boxes": {"seed": 5, "counts": (0, 0, 0, 0), "some_invalid": True},
}


def slow_iou(a: list[float], b: list[float]) -> float:
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return intersection / max(areas - intersection, 1e-6)


def boxes_of(scene: Scene, image: int) -> list[list[float]]:
    return scene.gt.boxes[image, scene.gt.valid[image]].tolist()


def usable_anchors(scene: Scene, image: int) -> list[int]:
    """Indices of the anchors that take part in an image."""
    if scene.valid_anchors is None:
        return list(range(len(scene.anchors)))
    return scene.valid_anchors[image].nonzero().flatten().tolist()

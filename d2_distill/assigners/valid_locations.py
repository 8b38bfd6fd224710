"""Which cells of the feature maps belong to an image, and which only to the padding of its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def valid_locations(
    image_size: tuple[int, int],
    grid_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    size_divisibility: int = 32,
    device: torch.device | None = None,
) -> torch.Tensor:
    """True for cells (i, j) with i * stride < height and j * stride < width of the image.

    The image's size is rounded up to a multiple of ``size_divisibility`` first, as if it were the only one
    of its batch: what an image trains does not depend on its neighbours' sizes.

    Args:
        image_size: height and width in pixels, before padding.
        grid_sizes: (H, W) of each level's feature map.
        strides: pixels a cell, one a level.

    Returns:
        (sum of H * W,) bool, levels concatenated, each row-major.
    """
    height, width = (-(-size // size_divisibility) * size_divisibility for size in image_size)
    masks = []
    for (rows, columns), stride in zip(grid_sizes, strides):
        inside_y = torch.arange(rows, device=device) * stride < height
        inside_x = torch.arange(columns, device=device) * stride < width
        masks.append((inside_y[:, None] & inside_x).flatten())
    return torch.cat(masks)

"""Maps that are read beside their cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sample_at_offsets(maps: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Read each cell of each map at a place of its own, bilinearly; outside of a map is 0.

    A deformable convolution of 1x1 ones on each channel gives the same, but cannot be exported to ONNX.

    Args:
        maps: (N, C, H, W).
        offsets: (N, 2C, H, W), for each map dy and dx from the cell, in cells.

    Returns:
        (N, C, H, W).
    """
    height, width = maps.shape[-2:]
    dy, dx = offsets.unflatten(1, (-1, 2)).unbind(dim=2)
    ys, xs = (torch.arange(size, dtype=maps.dtype, device=maps.device) for size in (height, width))
    # -1 and 1 are the outer sides of the outer cells.
    places = torch.stack([(2 * (xs + dx) + 1) / width - 1, (2 * (ys[:, None] + dy) + 1) / height - 1], dim=-1)
    read = F.grid_sample(maps.flatten(0, 1)[:, None], places.flatten(0, 1), align_corners=False)
    return read.view_as(maps)

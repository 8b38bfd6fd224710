"""The masks of focal distillation (FGD; Yang et al., CVPR 2022, arXiv 2111.11837): where it looks, and how closely."""

from __future__ import annotations

import torch


def feature_energy(features: torch.Tensor) -> torch.Tensor:
    """G^S of FGD: the mean of |F| over the channels, (N, C, H, W) -> (N, H, W)."""
    return features.abs().mean(dim=1)


def spatial_attention(features: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """A^S of FGD: H * W times the softmax of :func:`feature_energy` over temperature, over the cells of a map.

    Returns:
        (N, H, W), whose mean over a map is 1.
    """
    energy = feature_energy(features) / temperature
    return energy.flatten(start_dim=1).softmax(dim=1).view_as(energy) * energy[0].numel()


def focal_masks(
    boxes: torch.Tensor, valid_boxes: torch.Tensor, size: tuple[int, int], stride: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """S of FGD on the foreground M, and on the background 1 - M: every object weighs as much as any other.

    A cell is in a box if the box covers a part of it. There it weighs 1 / (number of the box's cells); in several
    boxes the smallest counts. A cell of the background weighs 1 / (number of cells of the background).

    Args:
        boxes: (N, G, 4) XYXY in pixels, padded.
        valid_boxes: (N, G) bool.
        size: (H, W) of the map.
        stride: pixels of a cell.

    Returns:
        foreground and background, (N, H, W) each; one of them is 0 in each cell.
    """
    starts, ends = boxes.unflatten(-1, (2, 2)).unbind(dim=-2)
    starts, ends = (starts / stride).floor(), (ends / stride).ceil()
    inside = []
    for axis, length in enumerate(reversed(size)):
        cells = torch.arange(length, device=boxes.device)
        inside.append((cells >= starts[..., axis, None]) & (cells < ends[..., axis, None]))
    covered = inside[1][..., :, None] & inside[0][..., None, :] & valid_boxes[..., None, None]
    weights = covered / covered.flatten(start_dim=2).sum(dim=-1).clamp(min=1)[..., None, None]
    # There may be no box at all.
    foreground = torch.cat([weights, weights.new_zeros(len(boxes), 1, *size)], dim=1).amax(dim=1)
    background = foreground == 0
    return foreground, background / background.flatten(start_dim=1).sum(dim=-1).clamp(min=1)[:, None, None]

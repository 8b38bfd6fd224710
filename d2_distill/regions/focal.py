"""The masks of focal distillation (FGD; Yang et al., CVPR 2022, arXiv 2111.11837): where it looks, and how closely."""

from __future__ import annotations

import torch

from ..boxes.chunks import reduce_over_boxes


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
    left, top = (boxes[..., :2] / stride).floor().unbind(dim=-1)
    right, bottom = (boxes[..., 2:] / stride).ceil().unbind(dim=-1)
    rows, columns = (torch.arange(length, device=boxes.device) for length in size)

    def weights(images: slice, some: slice) -> torch.Tensor:
        covers_row = (rows >= top[images, some, None]) & (rows < bottom[images, some, None])
        covers_column = (columns >= left[images, some, None]) & (columns < right[images, some, None])
        covered = (covers_row & valid_boxes[images, some, None])[..., None] & covers_column[..., None, :]
        return (covered / covered.flatten(start_dim=2).sum(dim=-1).clamp(min=1)[..., None, None]).amax(dim=1)

    if boxes.shape[1]:
        foreground = reduce_over_boxes(weights, torch.maximum, valid_boxes, size[0] * size[1])
    else:
        foreground = torch.zeros(len(boxes), *size, device=boxes.device)
    background = foreground == 0
    return foreground, background / background.flatten(start_dim=1).sum(dim=-1).clamp(min=1)[:, None, None]

"""IoU losses of paired boxes in OpenMMLab's convention: areas are clamped from below at eps.

torchvision's ``generalized_box_iou_loss`` adds eps instead, and fvcore's refuses boxes of negative size,
which decoded predictions of distances can have; published distillation numbers depend on the form here.
"""

from __future__ import annotations

from typing import Tuple

import torch


def _area(sides: torch.Tensor) -> torch.Tensor:
    return sides[..., 0] * sides[..., 1]


def _iou_and_union(
    boxes: torch.Tensor, targets: torch.Tensor, eps: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    overlap = boxes[..., 2:].minimum(targets[..., 2:]) - boxes[..., :2].maximum(targets[..., :2])
    intersection = _area(overlap.clamp(min=0))
    areas = _area(boxes[..., 2:] - boxes[..., :2]) + _area(targets[..., 2:] - targets[..., :2])
    union = (areas - intersection).clamp(min=eps)
    return intersection / union, union


def giou_loss(boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """1 - GIoU of each pair of boxes (Rezatofighi et al., arXiv 1902.09630), in [0, 2].

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: lower bound of the union and of the enclosing area.

    Returns:
        (...) tensor.
    """
    iou, union = _iou_and_union(boxes, targets, eps)
    hull = boxes[..., 2:].maximum(targets[..., 2:]) - boxes[..., :2].minimum(targets[..., :2])
    enclosing = _area(hull.clamp(min=0)).clamp(min=eps)
    return 1 - iou + (enclosing - union) / enclosing


def log_iou_loss(boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """-log(IoU) of each pair of boxes (UnitBox, arXiv 1608.01471).

    The IoU is clamped at eps: disjoint boxes cost -log(eps) and get no gradient.

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: lower bound of the union and of the IoU.

    Returns:
        (...) tensor.
    """
    iou, _ = _iou_and_union(boxes, targets, eps)
    return -iou.clamp(min=eps).log()

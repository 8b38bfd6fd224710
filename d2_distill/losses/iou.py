"""IoU losses of paired boxes in OpenMMLab's convention: areas are clamped from below at eps.

torchvision's and fvcore's losses differ: the former adds eps to areas, the latter refuses boxes of negative
size, which decoded predictions of distances can have; published numbers depend on the forms here.

Boxes and targets are (..., 4) XYXY and are broadcast; the losses are (...). ``offset`` is added to
intersection and union: AdelaiDet's FCOS takes 1, with boxes in units of the stride.
"""

from __future__ import annotations

import math

import torch


def giou_loss(
    boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """1 - GIoU of each pair of boxes (Rezatofighi et al., arXiv 1902.09630), in [0, 2].

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: lower bound of the union and of the enclosing area.
        offset: added to intersection and union of the IoU, not of the GIoU's second term.

    Returns:
        (...) tensor.
    """
    intersection, union = _intersection_and_union(boxes, targets)
    union = union.clamp(min=eps)
    enclosing = _area(_hull(boxes, targets)).clamp(min=eps)
    return 1 - (intersection + offset) / (union + offset) + (enclosing - union) / enclosing


def log_iou_loss(
    boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """-log(IoU) of each pair of boxes (UnitBox, arXiv 1608.01471).

    The IoU is clamped at eps: without an offset, disjoint boxes cost -log(eps) and get no gradient.

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: lower bound of the union and of the IoU.
        offset: added to intersection and union.

    Returns:
        (...) tensor.
    """
    return -_iou(boxes, targets, eps, offset).clamp(min=eps).log()


def linear_iou_loss(
    boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """1 - IoU of each pair of boxes; without an offset, disjoint boxes cost 1 and get no gradient.

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: lower bound of the union.
        offset: added to intersection and union.

    Returns:
        (...) tensor.
    """
    return 1 - _iou(boxes, targets, eps, offset)


def diou_loss(boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """1 - IoU + rho^2 / c^2 with the centres' distance rho and the diagonal c of the enclosing box
    (Zheng et al., arXiv 1911.08287), in [0, 2).

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: added to the union and to c^2.

    Returns:
        (...) tensor.
    """
    iou, distance = _iou_and_distance(boxes, targets, eps)
    return 1 - iou + distance


def ciou_loss(boxes: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The DIoU loss plus v^2 / (1 - IoU + v), where v = (2 / pi * difference of the boxes' angles
    atan(width / height)) ** 2 (Zheng et al., arXiv 1911.08287).

    The gradient flows through all of v, as in OpenMMLab. Its form is nan for boxes that match exactly; the
    loss is 0 there.

    Args:
        boxes, targets: (..., 4) XYXY.
        eps: added to the union, to c^2 and to the heights.

    Returns:
        (...) tensor.
    """
    iou, distance = _iou_and_distance(boxes, targets, eps)
    v = (2 / math.pi * (_angle(boxes, eps) - _angle(targets, eps))).square()
    return 1 - iou + distance + v.square() / (1 - iou + v).clamp(min=eps)


BOX_LOSSES = {
    "giou": giou_loss,
    "iou": log_iou_loss,
    "linear_iou": linear_iou_loss,
    "diou": diou_loss,
    "ciou": ciou_loss,
}


def _area(sides: torch.Tensor) -> torch.Tensor:
    return sides[..., 0] * sides[..., 1]


def _intersection_and_union(boxes: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    overlap = boxes[..., 2:].minimum(targets[..., 2:]) - boxes[..., :2].maximum(targets[..., :2])
    intersection = _area(overlap.clamp(min=0))
    areas = _area(boxes[..., 2:] - boxes[..., :2]) + _area(targets[..., 2:] - targets[..., :2])
    return intersection, areas - intersection


def _hull(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(..., 2) width and height of the smallest box that encloses both."""
    hull = boxes[..., 2:].maximum(targets[..., 2:]) - boxes[..., :2].minimum(targets[..., :2])
    return hull.clamp(min=0)


def _iou(boxes: torch.Tensor, targets: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    intersection, union = _intersection_and_union(boxes, targets)
    return (intersection + offset) / (union.clamp(min=eps) + offset)


def _iou_and_distance(
    boxes: torch.Tensor, targets: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU, and squared distance of the centres over the squared diagonal; both denominators + eps."""
    intersection, union = _intersection_and_union(boxes, targets)
    centers, target_centers = (x[..., :2] + x[..., 2:] for x in (boxes, targets))
    distance = (centers - target_centers).square().sum(dim=-1) / 4
    return intersection / (union + eps), distance / (_hull(boxes, targets).square().sum(dim=-1) + eps)


def _angle(boxes: torch.Tensor, eps: float) -> torch.Tensor:
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(dim=-1)
    return torch.atan2(width, height + eps)

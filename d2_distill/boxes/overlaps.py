"""How much each box of one set overlaps each box of another."""

from __future__ import annotations

import torch

EPS = 1e-6  # lower bound of every denominator, in square pixels
MODES = ("iou", "iof", "diou", "iof_diou")


@torch.no_grad()
def pairwise_overlaps(boxes1: torch.Tensor, boxes2: torch.Tensor, mode: str = "iou") -> torch.Tensor:
    """Overlap of all pairs of boxes; no gradient.

    With I and U the areas of intersection and union, A the area of the first box, rho the distance of the
    centres and c the diagonal of the smallest enclosing box (Zheng et al., arXiv 1911.08287):

    - "iou": I / U;
    - "iof": I / A, the part of the first box that lies in the second;
    - "diou": I / U - rho^2 / c^2;
    - "iof_diou": I / A - rho^2 / c^2, which is what LD's released code computes for "diou".

    Args:
        boxes1: (..., M, 4) XYXY.
        boxes2: (..., K, 4) XYXY; leading dimensions are broadcast.
        mode: one of the above.

    Returns:
        (..., M, K).

    Raises:
        ValueError: ``mode`` has another value.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose from {', '.join(MODES)}")
    # One (..., M, K) tensor a coordinate, updated in place: the pairs of a batch are many.
    x11, y11, x12, y12 = (side[..., :, None] for side in _sides(boxes1))
    x21, y21, x22, y22 = (side[..., None, :] for side in _sides(boxes2))
    overlaps = x12.minimum(x22).sub_(x11.maximum(x21)).clamp_(min=0)
    overlaps *= y12.minimum(y22).sub_(y11.maximum(y21)).clamp_(min=0)
    area = (x12 - x11) * (y12 - y11)
    if mode.startswith("iof"):
        overlaps /= area.clamp_(min=EPS)
    else:
        overlaps /= (area + (x22 - x21) * (y22 - y21)).sub_(overlaps).clamp_(min=EPS)
    if mode.endswith("diou"):
        distance = ((x11 + x12) - (x21 + x22)).square_()
        distance += ((y11 + y12) - (y21 + y22)).square_()
        diagonal = x12.maximum(x22).sub_(x11.minimum(x21)).square_()
        diagonal += y12.maximum(y22).sub_(y11.minimum(y21)).square_()
        overlaps -= distance.div_(diagonal.clamp_(min=EPS)).div_(4)
    return overlaps


def _sides(boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four coordinates, each contiguous: strided ones would slow down every pairwise operation."""
    return tuple(side.contiguous() for side in boxes.unbind(dim=-1))

"""Box2BoxTransform, Box2BoxTransformLinear and the box loss of dense heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from detectron2.layers import cat
from detectron2.structures import Boxes
from fvcore.nn import giou_loss, smooth_l1_loss
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss

# exp of a larger delta would make boxes more than 1000 / 16 times the anchor
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)


def _centres_and_sizes(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 2) centres and (..., 2) sizes of XYXY boxes."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


class Box2BoxTransform:
    """(dx, dy, dw, dh): centre shift over source size, log ratio of sizes (arXiv:1311.2524, appendix C).

    Args:
        weights: factors of the four deltas.
        scale_clamp: largest dw, dh (before the factor) that :meth:`apply_deltas` follows.
    """

    def __init__(self, weights: tuple[float, float, float, float], scale_clamp: float = _DEFAULT_SCALE_CLAMP):
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """The (N, 4) deltas that take ``src_boxes`` to ``target_boxes``, both (N, 4) XYXY."""
        src_centres, src_sizes = _centres_and_sizes(src_boxes)
        target_centres, target_sizes = _centres_and_sizes(target_boxes)
        assert (src_sizes[..., 0] > 0).all(), "source boxes of Box2BoxTransform must have a positive width"
        shift = (target_centres - src_centres) / src_sizes
        deltas = torch.cat([shift, torch.log(target_sizes / src_sizes)], dim=-1)
        return deltas * deltas.new_tensor(self.weights)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (N, 4 k), float32, that (N, 4 k) deltas make of (N, 4) boxes."""
        deltas = deltas.float()  # in half precision the exponential would overflow
        centres, sizes = _centres_and_sizes(boxes.to(deltas.dtype).unsqueeze(1))
        # No -1, which ONNX could not resolve for no boxes.
        d = deltas.unflatten(-1, (deltas.shape[-1] // 4, 4)) / deltas.new_tensor(self.weights)
        centres = centres + d[..., :2] * sizes
        half = 0.5 * torch.exp(d[..., 2:].clamp(max=self.scale_clamp)) * sizes
        return torch.cat([centres - half, centres + half], dim=-1).reshape(deltas.shape)


class Box2BoxTransformLinear:
    """(l, t, r, b): distances from the source's centre to the target's sides (FCOS, arXiv:1904.01355).

    They are in units of the source's width and height.
    """

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """The (..., 4) distances of ``target_boxes`` as seen from ``src_boxes``, both (..., 4) XYXY."""
        centres, sizes = _centres_and_sizes(src_boxes)
        deltas = torch.cat([centres - target_boxes[..., :2], target_boxes[..., 2:] - centres], dim=-1)
        return deltas / torch.cat([sizes, sizes], dim=-1)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (N, 4), float32, that (N, 4) distances, cut at 0, make of (N, 4) boxes."""
        centres, sizes = _centres_and_sizes(boxes.float())
        to_upper_left, to_lower_right = F.relu(deltas.float()).unflatten(-1, (2, 2)).unbind(dim=-2)
        return torch.cat([centres - to_upper_left * sizes, centres + to_lower_right * sizes], dim=-1)


_IOU_LOSSES = {"giou": giou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}


def _dense_box_regression_loss(
    anchors: list[Boxes], box2box_transform: Box2BoxTransform | Box2BoxTransformLinear,
    pred_anchor_deltas: list[torch.Tensor], gt_boxes: list[torch.Tensor], fg_mask: torch.Tensor,
    box_reg_loss_type: str = "smooth_l1", smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """Box loss summed over the foreground anchors of a batch.

    Args:
        anchors: per level, R_l; R below is their sum.
        pred_anchor_deltas: per level, (N, R_l, 4).
        gt_boxes: per image, the (R, 4) box matched to each anchor.
        fg_mask: (N, R), True for foreground.
        box_reg_loss_type: ``smooth_l1`` on deltas, or ``giou``, ``diou``, ``ciou`` on decoded boxes.
    """
    sources = Boxes.cat(anchors).tensor[fg_mask.nonzero(as_tuple=True)[1]]
    targets = torch.stack(gt_boxes)[fg_mask]
    deltas = cat(pred_anchor_deltas, dim=1)[fg_mask]
    if box_reg_loss_type == "smooth_l1":
        target_deltas = box2box_transform.get_deltas(sources, targets)
        return smooth_l1_loss(deltas, target_deltas, beta=smooth_l1_beta, reduction="sum")
    if box_reg_loss_type in _IOU_LOSSES:
        return _IOU_LOSSES[box_reg_loss_type](
            box2box_transform.apply_deltas(deltas, sources), targets, reduction="sum")
    raise ValueError(f"BBOX_REG_LOSS_TYPE is {box_reg_loss_type!r}, not smooth_l1, giou, diou or ciou")

"""What a head predicts of a box, and the box that it means: deltas, distances or distributions of distances.

A coder turns outputs (..., box_dim) of anchors (..., 4), on levels of strides (...), into XYXY boxes in
pixels. All are functions of single anchors: rows may be all anchors of a batch or a gathered few. ``reg_max`` is the
last bin of each side's distribution, None of a coder without distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from ..boxes.geometry import boxes_from_distances, centers_of


class TwoSidedBox2BoxTransform(Box2BoxTransform):
    """Box2BoxTransform that bounds the predicted change of width and height on both sides.

    Detectron2 clamps log-ratios only from above (``scale_clamp``); OpenMMLab's detectors, and so the decoded
    boxes that distillation compares, also clamp them from below at ``-scale_clamp``.
    """

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            deltas: (N, 4k), k transformations of each box.
            boxes: (N, 4) XYXY.

        Returns:
            (N, 4k) boxes.
        """
        # No -1, which ONNX could not resolve for no boxes.
        x, y, width, height = deltas.float().unflatten(-1, (deltas.shape[-1] // 4, 4)).unbind(dim=-1)
        # Bounds as numbers: a tensor of them would be uploaded to a GPU in every step.
        lowest_width, lowest_height = (-self.scale_clamp * weight for weight in self.weights[2:])
        bounded = torch.stack([x, y, width.clamp(min=lowest_width), height.clamp(min=lowest_height)], dim=-1)
        return super().apply_deltas(bounded.view_as(deltas), boxes)


class DeltaCoder:
    """Shifts and log-ratios relative to the anchor (R-CNN, arXiv 1311.2524).

    Args:
        weights: of dx, dy, dw, dh, as in ``MODEL.RETINANET.BBOX_REG_WEIGHTS``.
    """

    box_dim = 4
    reg_max = None

    def __init__(self, weights: Sequence[float]) -> None:
        self.transform = TwoSidedBox2BoxTransform(weights=tuple(weights))

    def decode(self, deltas: torch.Tensor, anchors: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
        rows = anchors.expand_as(deltas).reshape(-1, 4)
        return self.transform.apply_deltas(deltas.reshape(-1, 4), rows).view_as(deltas)

    def encode(self, boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Deltas (M, 4) that turn anchors (M, 4) into boxes (M, 4)."""
        return self.transform.get_deltas(anchors, boxes)


class DistanceCoder:
    """Distances from the anchor's centre to the four sides (FCOS, arXiv 1904.01355).

    Args:
        activation: "exp": the exponential of the output, in pixels (the paper's form); "relu": the output
            clamped at 0, in strides (that of its later releases); "none": the output, in strides (TOOD).
    """

    box_dim = 4
    reg_max = None

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def decode(self, outputs: torch.Tensor, anchors: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
        outputs = outputs.float()
        if self.activation == "exp":
            distances = outputs.exp()
        else:
            distances = (outputs.relu() if self.activation == "relu" else outputs) * strides[..., None]
        return boxes_from_distances(centers_of(anchors), distances)


class DistributionCoder:
    """A discrete distribution of each distance, in strides (Generalized Focal Loss, arXiv 2006.04388).

    The distance is the mean of the bins 0..reg_max under the softmax of their logits; logits are edge-major.
    """

    def __init__(self, reg_max: int) -> None:
        self.reg_max = reg_max
        self.box_dim = 4 * (reg_max + 1)

    def distances(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., 4 * (reg_max + 1)) logits to (..., 4) distances in strides."""
        probabilities = logits.float().unflatten(-1, (4, self.reg_max + 1)).softmax(dim=-1)
        # No matrix product, which autocast would round to half precision.
        return (probabilities * torch.arange(self.reg_max + 1.0, device=logits.device)).sum(dim=-1)

    def decode(self, logits: torch.Tensor, anchors: torch.Tensor, strides: torch.Tensor) -> torch.Tensor:
        return boxes_from_distances(centers_of(anchors), self.distances(logits) * strides[..., None])

    def targets(self, distances: torch.Tensor) -> torch.Tensor:
        """Distances in strides, moved into what the bins can express: [0, reg_max - 0.1]."""
        return distances.clamp(min=0, max=self.reg_max - 0.1)

"""Box coding in OpenMMLab's convention."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform


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
        shifts, scales = deltas.float().unflatten(-1, (-1, 2, 2)).unbind(dim=-2)
        lowest = -self.scale_clamp * scales.new_tensor(self.weights[2:])
        bounded = torch.stack([shifts, torch.maximum(scales, lowest)], dim=-2)
        return super().apply_deltas(bounded.flatten(start_dim=1), boxes)

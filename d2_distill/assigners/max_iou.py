"""RetinaNet's assignment by the highest IoU, in OpenMMLab's convention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..boxes.overlaps import pairwise_overlaps
from .assignment import BACKGROUND, IGNORED


def match_max_iou(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    valid_boxes: torch.Tensor,
    valid_anchors: torch.Tensor | None = None,
    *,
    thresholds: Sequence[float],
    labels: Sequence[int],
) -> torch.Tensor:
    """Give each anchor the box that it overlaps most, then each box the anchors that overlap it most.

    Detectron2's ``allow_low_quality_matches`` only makes such an anchor positive and leaves it with the box
    that it overlaps most itself; here it is re-assigned, as in the RetinaNets that published distillation
    numbers are of.

    Args:
        anchors: (R, 4) XYXY.
        boxes: (N, G, 4) XYXY of N images, padded; G may be 0.
        valid_boxes: (N, G) bool, False where padded.
        valid_anchors: (N, R) bool, the others overlap nothing; None: all are valid.
        thresholds, labels: of Detectron2's Matcher: ``labels[i]`` (1 positive, 0 negative, -1 ignored) holds
            from IoU ``thresholds[i - 1]`` on.

    Returns:
        (N, R) int64: index of the box, BACKGROUND or IGNORED.
    """
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), len(anchors)), BACKGROUND, device=anchors.device)
    overlaps = pairwise_overlaps(boxes, anchors, "iou").masked_fill(~valid_boxes[..., None], 0)
    if valid_anchors is not None:
        overlaps = overlaps * valid_anchors[:, None]
    best, matches = overlaps.max(dim=1)
    level = torch.bucketize(best, best.new_tensor(thresholds), right=True)
    label = torch.tensor(labels, device=best.device)[level]
    matches = matches.masked_fill(label == 0, BACKGROUND).masked_fill(label == -1, IGNORED)
    return claim_best_anchors(overlaps, matches)


def claim_best_anchors(overlaps: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Give each box all the anchors that attain its highest IoU, whatever they were assigned before.

    An anchor that several boxes claim goes to the last of them. A box that overlaps no anchor claims none;
    the reference lets it grab every anchor that it does not touch.

    Args:
        overlaps: (N, G, R) IoU of G > 0 boxes with R anchors.
        matches: (N, R) assignment so far; not changed.

    Returns:
        New matches.
    """
    highest = overlaps.amax(dim=2, keepdim=True)
    claims = (overlaps == highest) & (highest > 0)
    order = torch.arange(1, overlaps.shape[1] + 1, dtype=torch.int32, device=overlaps.device)
    claimant = (claims * order[:, None]).amax(dim=1).long()  # 1-based, 0: nobody
    return torch.where(claimant > 0, claimant - 1, matches)

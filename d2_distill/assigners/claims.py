"""Which box gets an anchor that several claim."""

from __future__ import annotations

import torch

from .assignment import BACKGROUND

MIN_DEPTH = 0.01  # pixels that the center of a positive anchor lies inside its box


def settle_claims(
    anchors: torch.Tensor, overlaps: torch.Tensor, claimed: torch.Tensor, num_anchors: int
) -> torch.Tensor:
    """Give each anchor to the claiming box of the largest IoU, of equal ones to the first.

    Args:
        anchors: (N, G, K) int64, K candidates of each of G boxes.
        overlaps: (N, G, K) IoU of each candidate with its box.
        claimed: (N, G, K) bool, the candidates that the box claims.
        num_anchors: R.

    Returns:
        (N, R) int64, index of the box, or BACKGROUND.
    """
    num_images, num_boxes, _ = claimed.shape
    order = torch.arange(num_boxes, device=claimed.device)[:, None].expand_as(claimed).flatten(1)
    anchors, claimed = anchors.flatten(1), claimed.flatten(1)
    overlaps = overlaps.flatten(1).masked_fill(~claimed, -1)
    largest = overlaps.new_full((num_images, num_anchors), -1).scatter_reduce(1, anchors, overlaps, "amax")
    winners = claimed & (overlaps == largest.gather(1, anchors))
    matches = anchors.new_full((num_images, num_anchors), num_boxes)
    matches = matches.scatter_reduce(1, anchors, order.masked_fill(~winners, num_boxes), "amin")
    return matches.masked_fill(matches == num_boxes, BACKGROUND)

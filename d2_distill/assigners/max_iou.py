"""OpenMMLab's MaxIoU assignment in the form of Detectron2's Matcher."""

from __future__ import annotations

from typing import List, Tuple

import torch
from detectron2.modeling.matcher import Matcher


class MaxIoUMatcher(Matcher):
    """A Matcher whose low-quality step gives an anchor to the box it is the best anchor of.

    Detectron2's own ``allow_low_quality_matches`` only makes such an anchor positive and leaves it with the
    box that it overlaps most; here it is re-assigned, as in the RetinaNets that published distillation
    numbers are of.
    """

    def __init__(self, thresholds: List[float], labels: List[int]) -> None:
        """
        Args:
            thresholds, labels: Matcher's; ``labels[i]`` holds from IoU ``thresholds[i - 1]`` on.
        """
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)

    def __call__(self, match_quality_matrix: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            match_quality_matrix: (M, N) IoU >= 0 of M ground-truth boxes with N anchors. A column of zeros
                takes an anchor out of the assignment: it is never claimed.

        Returns:
            Box index (N,) int64 and label (N,) int8 (1 positive, 0 negative, -1 ignored) of each anchor. No
            box: all anchors are negative and the index is 0.
        """
        matches, labels = super().__call__(match_quality_matrix)
        return claim_best_anchors(match_quality_matrix, matches, labels)


def claim_best_anchors(
    quality: torch.Tensor, matches: torch.Tensor, labels: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Give each box all the anchors that attain its highest IoU, whatever they were assigned before.

    An anchor that several boxes claim goes to the last of them. A box that overlaps no anchor claims none;
    the reference lets it grab every anchor that it does not touch.

    Args:
        quality: (M, N) IoU of M boxes with N anchors.
        matches, labels: (N,) assignment so far; not changed.

    Returns:
        New matches and labels.
    """
    if quality.numel() == 0:
        return matches, labels
    highest = quality.amax(dim=1, keepdim=True)
    best = (quality == highest) & (highest > 0)
    order = torch.arange(1, len(quality) + 1, dtype=torch.int32, device=quality.device)
    claimant = (best * order[:, None]).amax(dim=0)  # 1-based, 0: nobody
    claimed = claimant > 0
    return torch.where(claimed, claimant.long() - 1, matches), labels.masked_fill(claimed, 1)

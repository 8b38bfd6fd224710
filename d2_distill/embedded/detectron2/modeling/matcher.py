"""Matcher, which assigns predictions to ground truth by a quality such as IoU."""

from __future__ import annotations

import torch


class Matcher:
    """Gives every prediction its best ground truth, and a label by how good that match is.

    Args:
        thresholds: ascending and positive; they divide the qualities into intervals [t_i, t_i+1).
        labels: the label of each interval, one more than thresholds: -1 ignore, 0 negative, 1 positive.
        allow_low_quality_matches: label as positive also the predictions that are a ground truth's best one
            (arXiv:1506.01497, section 3.1.2 (i)).
    """

    def __init__(self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool = False):
        assert thresholds[0] > 0, f"IoU thresholds must be positive: {thresholds}"
        assert list(thresholds) == sorted(thresholds), f"IoU thresholds must ascend: {thresholds}"
        assert set(labels) <= {-1, 0, 1}, f"IoU labels must be -1, 0 or 1: {labels}"
        assert len(labels) == len(thresholds) + 1, f"{labels} must be one more than {thresholds}"
        self.thresholds = list(thresholds)
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Match by an M x N matrix, M ground truths, N predictions.

        Returns:
            matches (N,) int64: index of the best ground truth; labels (N,) int8. Without ground truth all
            matches are 0 and all labels ``labels[0]``.
        """
        quality = match_quality_matrix
        if quality.numel() == 0:
            matches = quality.new_zeros(quality.shape[1], dtype=torch.int64)
            return matches, torch.full_like(matches, self.labels[0], dtype=torch.int8)
        assert (quality >= 0).all(), "match qualities must not be negative or NaN"
        best, matches = quality.max(dim=0)
        interval = torch.bucketize(best, best.new_tensor(self.thresholds), right=True)
        match_labels = torch.tensor(self.labels, dtype=torch.int8, device=best.device)[interval]
        if self.allow_low_quality_matches:
            attained = quality == quality.max(dim=1, keepdim=True).values
            match_labels[attained.any(dim=0)] = 1
        return matches, match_labels

"""General instances (Dai et al., arXiv 2103.02340): where student and teacher disagree most."""

from __future__ import annotations

import torch
from torchvision.ops import nms

FIRST_CONSIDERED = 1024  # rows that NMS sees first; more follow if it keeps too few


def general_instance_rows(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    student_boxes: torch.Tensor,
    teacher_boxes: torch.Tensor,
    nms_thresh: float = 0.3,
    max_rows: int = 10,
) -> torch.Tensor:
    """The rows of the largest differences in score that do not overlap each other.

    The class with the largest difference decides for its row: the box is that of the detector with the
    higher score there.

    Args:
        student_scores, teacher_scores: (M, C) probabilities.
        student_boxes, teacher_boxes: (M, 4) XYXY, in any unit.
        nms_thresh: of two rows with a larger IoU only the one of the larger difference is kept.
        max_rows: number of rows at most.

    Returns:
        (k,) int64 row indices, the largest difference first.
    """
    differences = teacher_scores - student_scores
    scores, classes = differences.abs().max(dim=1)
    teacher_higher = differences.gather(1, classes[:, None]) >= 0
    boxes = torch.where(teacher_higher, teacher_boxes, student_boxes)
    # What is kept of the best rows does not depend on the rest; NMS of all would take seconds, gigabytes.
    considered = FIRST_CONSIDERED
    while True:
        best = scores.topk(min(considered, len(scores))).indices
        kept = best[nms(boxes[best], scores[best], nms_thresh)]
        if len(kept) >= max_rows or len(best) == len(scores):
            return kept[:max_rows]
        considered *= 8

"""Detections that two paths through a detector's kernels find: the same up to rounding."""

from __future__ import annotations

import torch
from detectron2.structures import Instances

from d2_distill.apps.export.verification import MAX_UNMATCHED, match


def assert_same_detections(
    found: Instances, expected: Instances, *, score_tolerance: float = 1e-4, corner_tolerance: float = 1e-2
) -> None:
    """Check that two images' detections agree.

    A few may be missing: those whose score or overlap rounding takes to the other side of a threshold. Their order
    does not matter, which scores decide that differ in their last digits.

    Args:
        score_tolerance, corner_tolerance: largest differences, the latter in pixels.
    """
    theirs, ours = match(_fields(expected), _fields(found))
    number = max(len(found), len(expected))
    assert number > 0 and number - len(ours) <= MAX_UNMATCHED * number, (len(ours), len(found), len(expected))
    torch.testing.assert_close(found.scores[ours], expected.scores[theirs], rtol=0, atol=score_tolerance)
    corners = found.pred_boxes.tensor[ours], expected.pred_boxes.tensor[theirs]
    torch.testing.assert_close(*corners, rtol=0, atol=corner_tolerance)


def _fields(detections: Instances) -> dict[str, torch.Tensor]:
    return {
        "boxes": detections.pred_boxes.tensor, "scores": detections.scores, "classes": detections.pred_classes
    }

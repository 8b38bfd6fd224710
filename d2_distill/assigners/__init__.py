"""Target assignment: which prior answers for which ground-truth box; functions of tensors only."""

from __future__ import annotations

from .max_iou import MaxIoUMatcher, claim_best_anchors
from .valid_locations import valid_locations

__all__ = ["MaxIoUMatcher", "claim_best_anchors", "valid_locations"]

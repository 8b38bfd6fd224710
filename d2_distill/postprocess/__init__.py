"""What becomes of a detector's boxes at test time."""

from __future__ import annotations

from .cluster_nms import cluster_nms
from .selection import select_nms

__all__ = ["cluster_nms", "select_nms"]

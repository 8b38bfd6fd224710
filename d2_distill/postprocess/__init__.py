"""What becomes of a detector's boxes at test time; functions of tensors only."""

from __future__ import annotations

from .cluster_nms import cluster_nms

__all__ = ["cluster_nms"]

"""How central a location lies in its box."""

from __future__ import annotations

import torch


def centerness_targets(distances: torch.Tensor) -> torch.Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (FCOS, Tian et al., arXiv 1904.01355 eq. 3).

    Args:
        distances: (..., 4), from a location to the left, top, right and bottom side of its box in any unit.

    Returns:
        (...) in [0, 1]; 0 where the location is not strictly inside the box.
    """
    near = distances[..., :2].minimum(distances[..., 2:]).clamp(min=0)
    far = distances[..., :2].maximum(distances[..., 2:]).clamp(min=torch.finfo(distances.dtype).tiny)
    return (near / far).prod(dim=-1).sqrt()

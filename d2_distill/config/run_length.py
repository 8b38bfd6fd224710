"""How long a run is."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils import comm


def count_iterations(cfg: CfgNode) -> int:
    """Return the number of training steps: ``SOLVER.MAX_ITER``, scaled to the number of processes as Detectron2 does."""
    reference, processes = cfg.SOLVER.REFERENCE_WORLD_SIZE, comm.get_world_size()
    return round(cfg.SOLVER.MAX_ITER * reference / processes) if reference else cfg.SOLVER.MAX_ITER

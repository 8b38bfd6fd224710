"""``seed_all_rng``: one seed for every random generator in use."""

from __future__ import annotations

import logging
import os
import random
import time

import numpy as np
import torch

# OpenCV must not start GPU work of its own in data loading workers.
os.environ.setdefault("OPENCV_OPENCL_RUNTIME", "disabled")


def seed_all_rng(seed: int | None = None) -> None:
    """Seed Python, numpy and torch (all devices); without a seed, by process and time, which is logged."""
    if seed is None:
        seed = (os.getpid() + time.time_ns()) % 2**31
        logging.getLogger(__name__).info("No seed is set; this run draws from %d.", seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)

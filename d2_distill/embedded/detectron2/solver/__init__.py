"""Optimizers and learning-rate schedules."""

from .build import build_lr_scheduler, build_optimizer, get_default_optimizer_params  # noqa: F401
from .lr_scheduler import LRMultiplier, WarmupParamScheduler  # noqa: F401

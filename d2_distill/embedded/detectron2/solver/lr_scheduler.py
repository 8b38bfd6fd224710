"""Learning-rate schedules in terms of training progress: warm-up, and the link to torch's schedulers."""

from __future__ import annotations

from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """A schedule whose first ``warmup_length`` (a fraction of training) is replaced by a warm-up.

    Args:
        scheduler: the schedule to be reached, a function of the progress in [0, 1].
        warmup_factor: the warm-up starts at ``warmup_factor * scheduler(0)``.
        warmup_length: in [0, 1].
        warmup_method: ``"linear"`` rises to the schedule's value at the warm-up's end, ``"constant"`` stays.
        rescale_interval: squeeze the whole schedule into what the warm-up leaves, not hide its start.
    """

    def __init__(self, scheduler: ParamScheduler, warmup_factor: float, warmup_length: float,
                 warmup_method: str = "linear", rescale_interval: bool = False):
        start = warmup_factor * scheduler(0.0)
        if warmup_method == "linear":
            warmup = LinearParamScheduler(start, scheduler(0.0 if rescale_interval else warmup_length))
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"SOLVER.WARMUP_METHOD is {warmup_method!r}; use 'linear' or 'constant'.")
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Sets every group's learning rate to its initial one times ``multiplier(iteration / max_iter)``.

    Only the initial rates and the iteration are saved: a resumed run follows its present config's schedule.
    """

    def __init__(self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int):
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        # Stepping past the last iteration keeps its rate: several schedules are not defined at progress 1.
        multiplier = self._multiplier(min(self.last_epoch, self._max_iter - 1) / self._max_iter)
        return [base_lr * multiplier for base_lr in self.base_lrs]

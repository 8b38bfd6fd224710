"""The hooks of a training loop: timing, schedule, writers, checkpoints, evaluation."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Callable

import detectron2.utils.comm as comm
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer

from .train_loop import HookBase


class IterationTimer(HookBase):
    """Puts the seconds of each step into the storage as ``time``, and logs at the end how long all took.

    The first two steps, which allocate and tune, put none.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._in_steps = 0.0

    def before_train(self):
        self._began = time.perf_counter()

    def before_step(self):
        self._step_began = time.perf_counter()

    def after_step(self):
        seconds = time.perf_counter() - self._step_began
        self._in_steps += seconds
        if self.trainer.iter - self.trainer.start_iter >= 2:
            self.trainer.storage.put_scalars(time=seconds)

    def after_train(self):
        steps = self.trainer.iter - self.trainer.start_iter
        clock, total = timedelta(seconds=int(time.perf_counter() - self._began)), self._in_steps
        logging.getLogger(__name__).info(
            f"{steps} steps took {timedelta(seconds=int(total))}, {total / max(steps, 1):.4f} s each; with "
            f"evaluations, checkpoints and other hooks it was {clock}")


class PeriodicWriter(HookBase):
    """Lets the writers write every ``period`` steps, after the last step and after training."""

    def __init__(self, writers: list[EventWriter], period: int = 20) -> None:
        self._writers = writers
        self._period = period

    def after_step(self):
        steps_done = self.trainer.iter + 1
        if steps_done % self._period == 0 or steps_done == self.trainer.max_iter:
            self._write()

    def after_train(self):
        # What hooks put after the last step, e.g. the final evaluation.
        self._write()
        for writer in self._writers:
            writer.close()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's periodic checkpointer as a hook: ``model_<iteration, 7 digits>`` and ``model_final``."""

    def before_train(self):
        self.max_iter = self.trainer.max_iter

    def after_step(self):
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Steps the trainer's scheduler after each step and records the learning rate that the step used."""

    def after_step(self):
        # The group of most tensors stands for all.
        group = max(self.trainer.optimizer.param_groups, key=lambda group: len(group["params"]))
        self.trainer.storage.put_scalar("lr", group["lr"], smoothing_hint=False)
        self.trainer.scheduler.step()

    def state_dict(self) -> dict:
        return self.trainer.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.trainer.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Calls an evaluation every ``eval_period`` steps (0: never) and after the last one.

    Args:
        eval_function: returns a (nested) dict of numbers, or nothing.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict]):
        self._period = eval_period
        self._func = eval_function

    def after_step(self):
        steps_done = self.trainer.iter + 1
        if self._period > 0 and steps_done % self._period == 0 and steps_done != self.trainer.max_iter:
            self._evaluate()

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            self._evaluate()
        del self._func  # it is likely to hold the trainer

    def _evaluate(self) -> None:
        results = self._func()
        if results:
            self.trainer.storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
        # Processes evaluate at different speed; none may begin the next step alone.
        comm.synchronize()

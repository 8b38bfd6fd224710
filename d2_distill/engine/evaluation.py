"""Evaluation during training, and what follows from it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Callable, Protocol

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

METRIC = "bbox/AP"


class Follower(Protocol):
    """Learns of each evaluation, in all processes, while the model holds the weights that were evaluated."""

    def observe(self, score: float, iteration: int) -> None:
        """Take the AP on the first test set (NaN if there is none) of the weights after step ``iteration``."""


class PeriodicEvaluation(HookBase):
    """Call ``trainer.evaluate()`` every ``period`` steps (0: never) and after the last one, like Detectron2's EvalHook.

    There are two differences, which make what follows from an evaluation exact:

    - The checkpoint of a step is written before the evaluation, so a killed run may lack the latter. A resumed run
      therefore starts with it.
    - All processes evaluate with the batch norm statistics of the main one, which are those in its checkpoints.

    Args:
        test_sets: ``DATASETS.TEST``.
        followers: called in this order.
        weights: makes the context in which the model holds the weights to evaluate.
    """

    def __init__(
        self,
        period: int,
        test_sets: Sequence[str],
        followers: Sequence[Follower],
        weights: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._period = period
        self._test_sets = test_sets
        self._followers = followers
        self._weights = weights
        self._evaluated = -1

    def before_train(self) -> None:
        steps_done = self.trainer.start_iter
        if 0 < steps_done < self.trainer.max_iter and self._is_due(steps_done):
            self.trainer.storage.iter = steps_done - 1
            self._evaluate(steps_done - 1)
            self.trainer.storage.iter = steps_done

    def after_step(self) -> None:
        steps_done = self.trainer.iter + 1
        if steps_done != self.trainer.max_iter and self._is_due(steps_done):
            self._evaluate(self.trainer.iter)

    def after_train(self) -> None:
        last = self.trainer.max_iter - 1
        if self.trainer.iter > last != self._evaluated:  # neither failed nor just evaluated
            self._evaluate(last)

    def _is_due(self, steps_done: int) -> bool:
        return self._period > 0 and steps_done % self._period == 0

    def _evaluate(self, iteration: int) -> None:
        with self._weights():
            share_buffers(self.trainer.checkpointer.model)
            results = self.trainer.evaluate()
            if results:
                self.trainer.storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
            score = first_score(results, self._test_sets) if comm.is_main_process() else None
            score = comm.all_gather(score)[0]
            self._evaluated = iteration
            if score is not None:
                for follower in self._followers:
                    follower.observe(score, iteration)
        comm.synchronize()  # no process may begin the next step alone


def first_score(results: dict[str, Any], test_sets: Sequence[str]) -> float | None:
    """Return the AP on the first test set from what ``Trainer.test`` returns; None if there is no test set."""
    if not test_sets:
        return None
    of_first = results if len(set(test_sets)) == 1 else results[test_sets[0]]
    return float(of_first.get("bbox", {}).get("AP", float("nan")))


def share_buffers(model: nn.Module) -> None:
    """Give all processes the floating-point buffers of the main one."""
    if comm.get_world_size() == 1:
        return
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                shared = buffer.contiguous()
                dist.broadcast(shared, 0)
                buffer.copy_(shared)

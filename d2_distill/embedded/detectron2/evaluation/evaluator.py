"""DatasetEvaluator and inference_on_dataset, which runs a model over a loader and feeds the evaluator."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_WARMUP_BATCHES = 5  # not timed: allocation and autotuning
_SECONDS_BETWEEN_LOGS = 5


class DatasetEvaluator:
    """Collects what a model gives for a data set and evaluates it: reset, process batches, evaluate."""

    def reset(self) -> None:
        """Forget everything processed so far."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take a batch: the model's inputs and its outputs, element by element."""

    def evaluate(self) -> dict[str, Any] | None:
        """Results {task: {metric: value}}; None or empty in processes other than the main one."""


class _Stopwatch:
    """Seconds spent on data, on the model, on the evaluator and in all, since the last start."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began = self._last = time.perf_counter()
        self.data = self.compute = self.evaluation = 0.0
        self.batches = 0

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began


@torch.no_grad()
def inference_on_dataset(
    model: nn.Module, data_loader: Iterable, evaluator: DatasetEvaluator
) -> dict[str, Any]:
    """Run the model, in eval mode and without gradient, over the loader, and evaluate.

    Args:
        model: called with each batch; its training mode is restored afterwards.
        data_loader: with a length.

    Returns:
        What the evaluator's ``evaluate`` returned; {} instead of None.
    """
    training = model.training
    model.eval()
    try:
        evaluator.reset()
        _process_all(model, data_loader, evaluator)
    finally:
        model.train(training)
    return evaluator.evaluate() or {}


def _process_all(model: nn.Module, data_loader: Iterable, evaluator: DatasetEvaluator) -> None:
    logger = logging.getLogger(__name__)
    total = len(data_loader)
    num_warmup = min(_WARMUP_BATCHES, total - 1)
    watch, last_log = _Stopwatch(), time.perf_counter()
    for index, inputs in enumerate(data_loader):
        if index == num_warmup:
            watch.start()
        watch.data += watch.lap()
        outputs = model(inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        watch.compute += watch.lap()
        evaluator.process(inputs, outputs)
        watch.evaluation += watch.lap()
        watch.batches += 1

        if time.perf_counter() - last_log > _SECONDS_BETWEEN_LOGS:
            last_log = time.perf_counter()
            parts = {"Dataloading": watch.data, "Inference": watch.compute, "Eval": watch.evaluation,
                     "Total": watch.total}
            times = " ".join(f"{part}: {spent / watch.batches:.4f} s/iter." for part, spent in parts.items())
            eta = datetime.timedelta(seconds=int(watch.total / watch.batches * (total - index - 1)))
            logger.info(f"Inference done {index + 1}/{total}. {times} ETA={eta}")
    if total:
        logger.info(f"Inference took {watch.total / watch.batches:.4f} s a batch, "
                    f"{watch.compute / watch.batches:.4f} s of it in the model")

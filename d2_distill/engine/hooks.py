"""Hooks that make a run stop and continue exactly, and keep the clock."""

from __future__ import annotations

import logging
import random
import signal
import time
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn

# Name of the last checkpoint of a run, without its suffix.
FINAL = "model_final"


class SeedEveryStep(HookBase):
    """Seeds every generator from (seed, iteration, rank) before each step.

    So the random choices of a step (RoI sampling, dropout) are the same in a resumed run, whatever came
    before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        words = np.random.SeedSequence((self.seed, self.trainer.iter, comm.get_rank())).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(words[1])
        random.seed(int(words[2]))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A random seed (SEED: -1) is drawn once a run, not once a process.
        self.seed = state["seed"]


class LossNormalizers(HookBase):
    """Saves the running loss normalisers of dense detectors, one a process; the state dict lacks them."""

    ATTRIBUTE = "loss_normalizer"

    def __init__(self, model: nn.Module, checkpoint_period: int) -> None:
        self._model = model
        self.period = checkpoint_period
        self._values: list[dict[str, float]] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0 or self.trainer.iter + 1 >= self.trainer.max_iter:
            self.gather()

    def gather(self) -> None:
        """To be called in all processes before the main one writes a checkpoint."""
        # A detector has its normaliser from its first step on.
        self._values = comm.all_gather({
            name: float(getattr(module, self.ATTRIBUTE))
            for name, module in self._model.named_modules()
            if hasattr(module, self.ATTRIBUTE)
        })

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values} if any(self._values) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["values"]) == comm.get_world_size():
            for name, value in state["values"][comm.get_rank()].items():
                setattr(self._model.get_submodule(name), self.ATTRIBUTE, value)


class TrainingClock(HookBase):
    """Scalar ``train_seconds``: wall time of all steps so far, resumed runs included, evaluation excluded."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        self.trainer.storage.put_scalar("train_seconds", self._seconds, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds = state["seconds"]


class RelayAfterBackward(HookBase):
    """Of what makes the steps: calls ``after_backward`` of the trainer's hooks, which Detectron2's DefaultTrainer leaves out.

    Args:
        trainer: whose hooks they are, or a proxy of it.
    """

    def __init__(self, trainer: TrainerBase) -> None:
        self._outer = trainer

    def after_backward(self) -> None:
        self._outer.after_backward()


class StopOnSignal(HookBase):
    """SIGINT or SIGTERM to any process ends the run after the current step, with a checkpoint to resume from.

    To be registered last. The processes agree on the step; they exit with status 128 + signal, as shells do.
    A second SIGINT acts at once.
    """

    def __init__(self, normalizers: LossNormalizers) -> None:
        self._normalizers = normalizers
        self._received = 0
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def after_step(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._restore()  # nothing is lost any more by an interrupted evaluation
            return
        number = max(comm.all_gather(self._received))
        if not number:
            return
        name = f"model_{self.trainer.iter:07d}"
        if (self.trainer.iter + 1) % self._normalizers.period:  # else this step's checkpoint is there already
            self._normalizers.gather()
            self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        logging.getLogger(__name__).info(
            "Stopped by %s after iteration %d; --resume continues from %s.pth.",
            signal.Signals(number).name, self.trainer.iter, name,
        )
        comm.synchronize()  # no process may be gone, and drag others along, before the checkpoint is written
        raise SystemExit(128 + number)

    def after_train(self) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

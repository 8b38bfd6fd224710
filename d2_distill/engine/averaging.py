"""A moving average of the student's weights, which is evaluated and delivered in place of the trained ones.

With w the trained weights after step t, counted from 0, the average follows a <- d a + (1 - d) w with
d = min(DECAY, (1 + t) / (10 + t)), so that it soon forgets the initial weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from ..checkpoint.exact import TrainingCheckpointer
from ..errors import UserError
from .hooks import FINAL

Tensors = Mapping[str, torch.Tensor]


class WeightAverage:
    """The average of all floating-point tensors of a model's state dict, statistics of batch norms included.

    Other tensors are those of the model. In checkpoints it stands under ``ema``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._average: Tensors = {}
        self._trained: Tensors | None = None  # while the model holds the average

    def start(self) -> None:
        """Begin with the model's weights, unless a checkpoint was loaded."""
        if not self._average:
            self._average = _copies(self._model.state_dict())

    def update(self, iteration: int) -> None:
        """Take the weights after step ``iteration`` into the average."""
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                if tensor.is_floating_point():
                    self._average[name].lerp_(tensor, 1 - decay)
                else:
                    self._average[name].copy_(tensor)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the model holds the average inside, and its trained weights again afterwards."""
        trained = self._trained = _copies(self._model.state_dict())
        _fill(self._model.state_dict(), self._average)
        try:
            yield
        finally:
            _fill(self._model.state_dict(), trained)
            self._trained = None

    def state_dict(self) -> dict[str, Any]:
        """Return whichever the checkpoint does not hold as its ``model``: the average, or the trained weights."""
        return {"average": self._average} if self._trained is None else {"trained": self._trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, after the checkpoint's ``model``."""
        self._average = _copies(self._model.state_dict())
        if "trained" in state:
            _fill(self._model.state_dict(), state["trained"])
        else:
            _fill(self._average, state["average"])


class AverageWeights(HookBase):
    """Update an average after each step."""

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def before_train(self) -> None:
        self._average.start()

    def after_step(self) -> None:
        self._average.update(self.trainer.iter)


class AveragingCheckpointer(TrainingCheckpointer):
    """The ``model`` of ``model_final.pth`` is the average; that of other checkpoints holds the trained weights."""

    def __init__(self, model: nn.Module, save_dir: str, *, average: WeightAverage, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, ema=average, **checkpointables)
        self._average = average

    def save(self, name: str, **kwargs: Any) -> None:
        with self._average.in_place() if name == FINAL else contextlib.nullcontext():
            super().save(name, **kwargs)


def check_averaging(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: ``SOLVER.EMA.DECAY`` is no decay, or ``TEST.PRECISE_BN`` would change the trained weights only.
    """
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return
    if not 0 < ema.DECAY < 1:
        raise UserError(f"SOLVER.EMA.DECAY is {ema.DECAY}; set it to a number between 0 and 1, such as 0.9998.")
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            "TEST.PRECISE_BN.ENABLED recomputes the batch norm statistics of the trained weights, but "
            "SOLVER.EMA.ENABLED evaluates their average; set one of them to False."
        )


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _fill(tensors: Tensors, values: Tensors) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])

"""Steps of the optimizer whose images go through the model in several parts, one after another."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer, but a step sums the gradients of ``parts`` equal parts of the batch.

    Each part's losses count one ``parts``-th, and the logged ones are the mean over the parts. So a step equals that of
    the whole batch where a loss is a mean over images. It does not where a loss is divided by a number of objects,
    anchors or RoIs in the batch, and where batch norms use the statistics of the batch: both are then of a part.
    """

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, *, parts: int) -> None:
        super().__init__(model, data_loader, optimizer)
        self._parts = parts

    def run_step(self) -> None:
        assert self.model.training, "The model is in eval mode; training needs model.train()."
        start = time.perf_counter()
        images = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        for index in range(self._parts):
            part = images[index * len(images) // self._parts : (index + 1) * len(images) // self._parts]
            # DDP averages the gradients of the processes once, with the last part.
            with contextlib.nullcontext() if index == self._parts - 1 else self._without_sync():
                for name, loss in self._add_gradients(part).items():
                    means[name] = means[name] + loss if name in means else loss
        self.after_backward()
        self._write_metrics(means, data_time)
        self._update_weights()

    def _without_sync(self) -> AbstractContextManager[Any]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _add_gradients(self, images: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the detached losses of a part, as they count in the step."""
        with self._precision():
            losses = {name: loss / self._parts for name, loss in self.model(images).items()}
            total = sum(losses.values())
        self._scaled(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _precision(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def _update_weights(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """The same in mixed precision, on GPUs."""

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=torch.float16)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self.grad_scaler.scale(loss)

    def _update_weights(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def build_stepper(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    """Return what makes a run's training steps, yet without data: Detectron2's trainer, or one in several parts."""
    parts, in_mixed_precision = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.AMP.ENABLED
    if parts == 1:
        return (AMPTrainer if in_mixed_precision else SimpleTrainer)(model, None, optimizer)
    return (AccumulatingAMPTrainer if in_mixed_precision else AccumulatingTrainer)(model, None, optimizer, parts=parts)


def check_accumulation(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: ``SOLVER.ACCUMULATION_STEPS`` is not positive, or does not divide the images of each process.
    """
    parts = cfg.SOLVER.ACCUMULATION_STEPS
    if parts < 1:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {parts}; set it to the number of parts of a batch, or to 1 for the "
            "whole batch at once."
        )
    # With a reference, IMS_PER_BATCH is that of as many processes.
    processes = cfg.SOLVER.REFERENCE_WORLD_SIZE or comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % (processes * parts) and parts > 1:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} process{'es' * (processes > 1)} "
            f"cannot compute in SOLVER.ACCUMULATION_STEPS {parts} equal parts each; make it a multiple of "
            f"{processes * parts}."
        )

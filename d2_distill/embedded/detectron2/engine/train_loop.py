"""The training loop with hooks, and one training step in full or mixed precision."""

from __future__ import annotations

import logging
import time
import weakref

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.utils.events import EventStorage, get_event_storage


class HookBase:
    """What a trainer calls around its steps; ``self.trainer`` is a weak reference to it.

    ``after_step`` sees ``trainer.iter`` as the number (from 0) of the step just made.
    """

    trainer: "TrainerBase"

    def before_train(self):
        """Called before the first step."""

    def after_train(self):
        """Called after the last step, also when a step failed."""

    def before_step(self):
        """Called before each step."""

    def after_backward(self):
        """Called in each step, when the gradients are there and the weights have not changed yet."""

    def after_step(self):
        """Called after each step."""

    def state_dict(self) -> dict:
        """What a checkpoint should keep; hooks that return something also have ``load_state_dict``."""
        return {}


class TrainerBase:
    """A loop over ``run_step`` with hooks.

    Attributes:
        iter: number of the current step; equal to ``max_iter`` once all are made.
        start_iter, max_iter: first step, and number after the last one.
        storage: the ``EventStorage`` that is open during training.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0
        self.max_iter = 0
        self.storage: EventStorage | None = None

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Append hooks (Nones are left out); they are called in this order."""
        for hook in filter(None, hooks):
            # A strong reference would be a cycle, and keep the model's memory after training.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Make the steps ``start_iter .. max_iter - 1``; exceptions are logged and raised again."""
        logger = logging.getLogger(__name__)
        logger.info(f"Steps {start_iter} to {max_iter - 1} begin.")
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter = max_iter
            except Exception:
                logger.exception(f"Step {self.iter} failed:")
                raise
            finally:
                self.after_train()

    def before_train(self):
        self._call_hooks("before_train")

    def after_train(self):
        self.storage.iter = self.iter
        self._call_hooks("after_train")

    def before_step(self):
        self.storage.iter = self.iter
        self._call_hooks("before_step")

    def after_backward(self):
        self._call_hooks("after_backward")

    def after_step(self):
        self._call_hooks("after_step")

    def _call_hooks(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()

    def state_dict(self) -> dict:
        state = {"iteration": self.iter}
        hooks = {type(hook).__qualname__: hook.state_dict() for hook in self._hooks if hook.state_dict()}
        return {**state, "hooks": hooks} if hooks else state

    def load_state_dict(self, state_dict: dict) -> None:
        self.iter = state_dict["iteration"]
        hooks = {type(hook).__qualname__: hook for hook in self._hooks}
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                logging.getLogger(__name__).warning(f"The checkpoint's state of hook {name} has no taker.")


class SimpleTrainer(TrainerBase):
    """One optimiser, one data source, one model that returns a dict of losses (or one loss).

    Args:
        model: put into training mode here; later changes of the mode are the caller's.
        data_loader: an iterable whose elements the model takes; should not end.
    """

    def __init__(self, model: torch.nn.Module, data_loader, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self._iterator = None

    @property
    def _data_loader_iter(self):
        # Made when first needed: a resumed trainer may still change its loader.
        if self._iterator is None:
            self._iterator = iter(self.data_loader)
        return self._iterator

    def run_step(self) -> None:
        """Forward, backward, update."""
        assert self.model.training, "The model is in eval mode; training needs model.train()."
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        loss_dict = self._forward(data)
        if isinstance(loss_dict, torch.Tensor):
            loss_dict = {"total_loss": loss_dict}
        self.optimizer.zero_grad()
        self._backward(sum(loss_dict.values()))
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self._update()

    def _forward(self, data):
        return self.model(data)

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()

    def _write_metrics(self, loss_dict: dict[str, torch.Tensor], data_time: float) -> None:
        """Put the losses (mean over processes), their sum and the time spent on data into the storage.

        Raises:
            FloatingPointError: the sum is not finite (on the main process).
        """
        metrics = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        metrics["data_time"] = data_time
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=self.iter)
        gathered = comm.gather(metrics)
        if not comm.is_main_process():
            return
        # The slowest process holds up the others.
        slowest = max(metrics["data_time"] for metrics in gathered)
        storage.put_scalar("data_time", slowest, cur_iter=self.iter)
        losses = {name: float(np.mean([metrics[name] for metrics in gathered])) for name in loss_dict}
        total_loss = sum(losses.values())
        if not np.isfinite(total_loss):
            raise FloatingPointError(
                f"The loss is not finite at iteration={self.iter}; its terms are {losses}.")
        storage.put_scalar("total_loss", total_loss, cur_iter=self.iter)
        if len(losses) > 1:
            storage.put_scalars(cur_iter=self.iter, **losses)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """The same step in mixed precision on CUDA, with scaled gradients."""

    def __init__(self, model: torch.nn.Module, data_loader, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, data_loader, optimizer)
        assert torch.cuda.is_available(), "SOLVER.AMP.ENABLED needs CUDA; set it to False."
        self.grad_scaler = torch.amp.GradScaler("cuda")

    def _forward(self, data):
        with torch.autocast("cuda"):
            return super()._forward(data)

    def _backward(self, loss: torch.Tensor) -> None:
        super()._backward(self.grad_scaler.scale(loss))

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

"""What a training step costs on this machine."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ...data.loader import build_train_loader
from ...engine.optimizer import build_optimizer
from ...layers.memory_format import in_fast_layout

UNTIMED, TIMED = 1, 5


class Seconds(NamedTuple):
    """What a detector costs.

    Attributes:
        step: seconds of a training step, data included.
        forward: seconds of its forward pass, data included.
    """

    step: float
    forward: float


def measure(cfg: CfgNode) -> Seconds:
    """Return medians over a few training steps of a plain detector; nothing is kept of them."""
    with torch.random.fork_rng(devices=[]):
        model = in_fast_layout(build_model(cfg)).train()
        optimizer = build_optimizer(cfg, model)
        batches, measured = iter(build_train_loader(cfg, start_iter=0, seed=0)), []
        with EventStorage():
            for _ in range(UNTIMED + TIMED):
                start = time.perf_counter()
                loss = sum(model(next(batches)).values())
                forward = _since(start, loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                measured.append(Seconds(_since(start, loss), forward))
    return Seconds(*(statistics.median(values) for values in zip(*measured[UNTIMED:])))


def _since(start: float, loss: torch.Tensor) -> float:
    if loss.device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start

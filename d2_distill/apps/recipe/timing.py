"""What a training step costs on this machine."""

from __future__ import annotations

import statistics
import time

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ...data.loader import build_train_loader
from ...engine.optimizer import build_optimizer
from ...layers.memory_format import in_fast_layout

UNTIMED, TIMED = 1, 3


def seconds_per_step(cfg: CfgNode) -> float:
    """Return the median over a few training steps of a plain detector, data included; nothing is kept of them."""
    with torch.random.fork_rng(devices=[]):
        model = in_fast_layout(build_model(cfg)).train()
        optimizer = build_optimizer(cfg, model)
        batches, seconds = iter(build_train_loader(cfg, start_iter=0, seed=0)), []
        with EventStorage():
            for _ in range(UNTIMED + TIMED):
                start = time.perf_counter()
                loss = sum(model(next(batches)).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if loss.device.type != "cpu":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[UNTIMED:])

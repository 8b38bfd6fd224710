"""Time that functions take, and images for those that need some."""

from __future__ import annotations

import time
from typing import Any, Callable

import torch
from detectron2.structures import Boxes, Instances


def synthetic_batch(batch_size: int, height: int, width: int, num_classes: int) -> list[dict[str, Any]]:
    """Detectron2 dataset dicts of noise images with eight boxes each, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(batch_size):
        corners = torch.rand(8, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1) + torch.tensor([0.0, 0.0, 8.0, 8.0]))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of a call, with all that it has queued on the GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def seconds_in_turns(
    functions: dict[str, Callable[[], Any]], *, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call of each function; they take turns, the first ``warmup`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            duration = seconds_of(function)
            if number >= warmup:
                seconds[name].append(duration)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

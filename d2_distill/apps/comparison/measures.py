"""What is measured on the detectors themselves: size, cost and speed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch
from detectron2.structures import Instances

from ...data.mapper import CheckedDatasetMapper
from ...engine.evaluate import load_detector
from ...evaluation.complexity import count_flops, count_parameters
from ...evaluation.speed import seconds_in_turns
from ...layers.memory_format import in_fast_layout
from .runs import Run

Record = dict[str, Any]  # an image and its annotations, in Detectron2's standard form
SPEED_IMAGES = 10  # each is detected once without being counted
SPEED_ROUNDS = 20


@dataclass(frozen=True)
class Measures:
    """None is what could not be measured."""

    parameters: int | None = None
    multiply_adds: int | None = None
    images_per_second: float | None = None


class Detector:
    """The detector of a run with its weights, on the GPU if there is one.

    Args:
        run: it must have a checkpoint.

    Raises:
        UserError: the checkpoint does not fit the run's config.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        cfg = run.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        cfg.MODEL.WEIGHTS = str(run.checkpoint)
        model = load_detector(cfg, weights_key=f"The run {run.folder}")
        self.model = in_fast_layout(model.eval())
        self.read = CheckedDatasetMapper(cfg, is_train=False)

    def detect(self, record: Record, threshold: float) -> Instances:
        """On the CPU, those that score at least the threshold."""
        instances = self.forward(self.read(record))["instances"].to("cpu")
        return instances[instances.scores >= threshold]

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return self.model([inputs])[0]


def measure_size(detector: Detector, record: Record | None) -> Measures:
    """Parameters, and the multiply-adds on the image of ``record`` if there is one."""
    flops = count_flops(detector.model, [detector.read(record)]) if record else None
    return Measures(parameters=count_parameters(detector.model), multiply_adds=flops)


def images_per_second(
    detectors: dict[str, Detector], records: Sequence[Record], *, progress: Callable[[str], None]
) -> dict[str, float]:
    """By the median time of a forward pass with post-processing, one image a batch, without reading it.

    The detectors take turns on the same images, so that all of them share the machine's moods.
    """
    rounds = len(records) + SPEED_ROUNDS
    calls = {name: _turns(detector, records) for name, detector in detectors.items()}
    number = itertools.count(1)

    def tell() -> None:
        progress(f"images/s: round {next(number)} of {rounds}")

    seconds = seconds_in_turns({"": tell, **calls}, warmup=len(records), rounds=SPEED_ROUNDS)
    return {name: 1 / statistics.median(seconds[name]) for name in calls}


def _turns(detector: Detector, records: Sequence[Record]) -> Callable[[], Any]:
    inputs = itertools.cycle([detector.read(record) for record in records])
    return lambda: detector.forward(next(inputs))

"""What a run is about to do, and what looks wrong about it, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config.run_length import count_iterations
from ..distiller import Distiller
from ..evaluation.complexity import count_flops, count_parameters
from ..methods import DistillMethod
from ..methods.schedules import last_iteration

logger = logging.getLogger(__name__)
FEWEST_PASSES, MOST_PASSES = 3, 300
# Test images may be larger or smaller than training images by this factor.
SIZE_FACTOR = 1.5
# Longer side of the image on which multiply-adds are counted, pixels.
COUNTED_SIDE = 256


@dataclass(frozen=True)
class Cost:
    """Size of a detector, and its multiply-adds for one image."""

    parameters: int
    flops: int

    @classmethod
    def of(cls, model: nn.Module, size: tuple[int, int]) -> Cost:
        """Measure a detector for an image of this height and width, by a smaller one of the same shape.

        Multiply-adds grow with the area; those of a two-stage detector only about so. Neither random numbers nor the
        modes of modules change.
        """
        scale = min(COUNTED_SIDE / max(size), 1.0)
        counted = [max(round(side * scale / 32), 1) * 32 for side in size]
        modes = {module: module.training for module in model.modules()}
        with torch.random.fork_rng(devices=[]):
            flops = count_flops(model, [{"image": torch.zeros(3, *counted, dtype=torch.uint8)}])
        for module, mode in modes.items():
            module.training = mode
        return cls(count_parameters(model), round(flops * size[0] * size[1] / (counted[0] * counted[1])))

    def __lt__(self, other: Cost) -> bool:
        return self.parameters < other.parameters and self.flops < other.flops

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.3g} GFLOPs"


def log_summary(cfg: CfgNode, model: nn.Module, images: int) -> None:
    """Log passes over the data, and size and cost of student and teacher; warn of what is probably a mistake.

    Args:
        model: to be trained.
        images: number of training images that are used.
    """
    size = cfg.INPUT.MIN_SIZE_TEST, min(cfg.INPUT.MAX_SIZE_TEST, round(cfg.INPUT.MIN_SIZE_TEST * 4 / 3))
    distils = isinstance(model, Distiller)
    student = _cost(model.student if distils else model, size)
    teacher = _cost(model.teacher.model, size) if distils and model.teacher is not None else None
    iterations, batch = count_iterations(cfg), cfg.SOLVER.IMS_PER_BATCH
    parts = [f"{passes(cfg, images):.3g} passes over {images} images ({iterations} iterations)"]
    if student:
        parts.append(f"{'student' if distils else 'detector'} {student}, for an image of {size[0]} x {size[1]} px")
    if teacher:
        parts.append(f"teacher {teacher}")
    logger.info("The run: %s.", "; ".join(parts))
    schedules = schedules_of(model.methods) if distils else {}
    for warning in warnings_of(cfg, images, schedules=schedules, student=student, teacher=teacher):
        logger.warning("%s", warning)


def _cost(model: nn.Module, size: tuple[int, int]) -> Cost | None:
    try:
        return Cost.of(model, size)
    except Exception as error:  # a user's detector may want other inputs, and can be trained all the same
        logger.info("The cost of %s is not known: %s", type(model).__name__, error)
        return None


def passes(cfg: CfgNode, images: int) -> float:
    """Return how often a run sees each image; ``SOLVER.REFERENCE_WORLD_SIZE`` does not change that."""
    return cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images


def schedules_of(methods: Mapping[str, DistillMethod]) -> dict[str, float]:
    """Return, by the key of each schedule of the methods, the last iteration at which it changes; 0 for never."""
    found: dict[str, float] = {}
    for name, method in methods.items():
        for term in method.weights:
            key = f"{method.KEY}.{method.SCHEDULE_KEYS.get(term, 'SCHEDULE')}" if method.KEY else f"The schedule of {name}"
            found[key] = max(found.get(key, 0), last_iteration(method.schedules[term]))
    return found


def warnings_of(
    cfg: CfgNode,
    images: int,
    *,
    schedules: Mapping[str, float],
    student: Cost | None = None,
    teacher: Cost | None = None,
) -> Iterator[str]:
    """Yield a sentence for each thing that is probably a mistake, with the key and what to do.

    Args:
        schedules: key of a schedule -> last iteration at which it changes.
    """
    iterations, solver = cfg.SOLVER.MAX_ITER, cfg.SOLVER
    trained, tested = _sides(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST
    # 0 leaves the images as they are.
    if tested and trained and trained[0] and not trained[0] / SIZE_FACTOR <= tested <= trained[-1] * SIZE_FACTOR:
        yield (
            f"INPUT.MIN_SIZE_TEST is {tested}, but the training sees images of INPUT.MIN_SIZE_TRAIN {tuple(trained)}: a "
            "detector finds little at a size that it has not seen; test at the size of the training."
        )
    if solver.WARMUP_ITERS >= iterations:
        yield (
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, but the run ends after {iterations} iterations, before the full "
            "learning rate; shorten the warm-up."
        )
    late = [step for step in solver.STEPS if step >= iterations]
    if late and "MultiStep" in solver.LR_SCHEDULER_NAME:
        yield (
            f"SOLVER.STEPS has {', '.join(map(str, late))}, but the run ends after {iterations} iterations, so the learning "
            "rate does not drop there; shorten STEPS with MAX_ITER."
        )
    for key, last in schedules.items():
        if last > count_iterations(cfg):
            yield (
                f"{key} has the iteration {last:g}, but the run ends after {count_iterations(cfg)}; lower it, or write parts of "
                'the run as decimals, such as ["Warmup", 0.02].'
            )
    if student and teacher and not student < teacher:
        more = "parameters" if student.parameters >= teacher.parameters else "GFLOPs"
        yield (
            f"The student has no fewer {more} than its teacher ({student}; the teacher: {teacher}); choose a smaller student, "
            "or use the teacher itself."
        )
    count = passes(cfg, images)
    if not FEWEST_PASSES <= count <= MOST_PASSES:
        yield (
            f"SOLVER.MAX_ITER {iterations} with IMS_PER_BATCH {solver.IMS_PER_BATCH} means {count:.3g} passes over the {images} "
            f"training images; {'lower' if count > MOST_PASSES else 'raise'} MAX_ITER, and STEPS with it."
        )


def _sides(sizes: Sequence[int] | int) -> list[int]:
    return sorted(sizes) if isinstance(sizes, (list, tuple)) else [sizes]

"""From objects and images to image size, anchors, batch, learning rate and length of a training: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from .objects import Objects

STRIDES = (8, 16, 32)  # P3 to P5
# Anchor side in strides, of which the one is chosen that reaches most objects.
SCALES = (2, 3, 4, 6, 8)
# This percentile of the objects shall have at least this side, three cells of the finest level.
SMALL_PERCENTILE, SMALL_SIDE = 20, 24
SIDE_STEP = 32  # what backbones pad images to
SMALLEST_SIDE = 96
# Images that a training sees, within bounds of passes over the data; the fewest are those of COCO's 1x schedule. From
# scratch a detector needs about twice as many.
VIEWS_PRETRAINED, VIEWS_SCRATCH = 20_000, 40_000
FEWEST_PASSES, MOST_PASSES = 12, 60
FEWEST_IN_BUDGET = 10
# AdamW at a batch of 8; another batch changes it with its root, the usual rule for Adam.
RATE_PRETRAINED, RATE_SCRATCH, RATE_BATCH = 0.001, 0.002, 8
WARMUP = 0.05
EVALUATIONS = 10
MOST_WORKERS = 4


@dataclass(frozen=True)
class Size:
    """How large detectors may be.

    Attributes:
        longest_side: of an image.
        channels, convs: of pyramid and towers.
        batch: images of a step.
    """

    longest_side: int
    channels: int
    convs: int
    batch: int


SIZES = {
    "tiny": Size(longest_side=192, channels=64, convs=2, batch=8),
    "small": Size(longest_side=448, channels=96, convs=3, batch=8),
    "medium": Size(longest_side=800, channels=128, convs=4, batch=16),
}


def image_side(objects: Objects, longest: int) -> int:
    """Return the longer side of training and test images, pixels: as short as small objects allow, up to the images' own."""
    small = float(np.percentile(objects.sizes, SMALL_PERCENTILE))
    own = float(np.median(objects.longer_sides))
    most = max(min(longest, math.ceil(own / SIDE_STEP) * SIDE_STEP), SMALLEST_SIDE)
    wanted = math.ceil(SMALL_SIDE / small / SIDE_STEP) * SIDE_STEP if small > 0 else most
    return min(max(wanted, SMALLEST_SIDE), most)


def anchor_scale(objects: Objects, side: int) -> int:
    """Return the side of an anchor in strides that reaches most objects; of equal ones that with the median in the middle."""
    median = float(np.median(objects.scaled(side)))

    def rank(scale: int) -> tuple[float, float]:
        return objects.reached(side, anchors(scale)), -abs(math.log(scale * STRIDES[1] / max(median, 1.0)))

    return max(SCALES, key=rank)


def anchors(scale: int) -> list[int]:
    """Return the anchor sides of all levels, pixels."""
    return [scale * stride for stride in STRIDES]


def batch_size(size: Size, images: int) -> int:
    """Return the images of a step, never more than there are."""
    return min(size.batch, images)


def learning_rate(batch: int, pretrained: bool) -> float:
    """Return AdamW's, by the root of the batch."""
    rate = RATE_PRETRAINED if pretrained else RATE_SCRATCH
    return float(f"{rate * math.sqrt(batch / RATE_BATCH):.2g}")


def workers(cores: int) -> int:
    """Return the processes that load images: one core is left to the training."""
    return min(max(cores - 1, 0), MOST_WORKERS)


def passes(images: int, pretrained: bool) -> float:
    """Return passes over the training images without a budget."""
    count = (VIEWS_PRETRAINED if pretrained else VIEWS_SCRATCH) / images
    return round(min(max(count, FEWEST_PASSES), MOST_PASSES))


def iterations(images: int, batch: int, count: float) -> int:
    """Return the iterations of so many passes, as a multiple of the number of evaluations."""
    return max(math.ceil(count * images / batch / EVALUATIONS), 1) * EVALUATIONS


def iterations_in(budget: float, seconds: float, images: int, batch: int, wanted: int) -> int:
    """Return the iterations that fit a budget, at most ``wanted``.

    Args:
        budget: seconds for a training.
        seconds: of one step.

    Raises:
        UserError: fewer than ten passes would fit.
    """
    fitting = int(budget / seconds)
    least = iterations(images, batch, FEWEST_IN_BUDGET)
    if fitting < min(least, wanted):
        raise UserError(
            f"--budget of {budget / 60:.3g} min is too short: a step takes {seconds:.2f} s here, so only "
            f"{fitting * batch / images:.1f} passes over the {images} images would fit; give at least "
            f"{math.ceil(least * seconds / 60)}min, a smaller --size, or fewer images."
        )
    return min(wanted, max(fitting // EVALUATIONS, 1) * EVALUATIONS)

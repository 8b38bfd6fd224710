"""The augmentations a detection config can ask for: ResizeShortestEdge, RandomFlip, RandomCrop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    VFlipTransform,
)

from .augmentation import Augmentation
from .transform import ResizeTransform


@dataclass
class RandomFlip(Augmentation):
    """Flip with probability ``prob``, in one direction."""

    prob: float = 0.5
    horizontal: bool = True
    vertical: bool = False

    def __post_init__(self):
        if self.horizontal == self.vertical:
            raise ValueError("RandomFlip flips in one direction: set either horizontal or vertical.")

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


@dataclass
class ResizeShortestEdge(Augmentation):
    """Resize so that the shorter side gets a chosen length and the longer side does not exceed ``max_size``.

    Args:
        short_edge_length: lengths to choose from; or, with ``sample_style`` "range", the least and the
            greatest length. Length 0 leaves the image as it is.
        sample_style: "range" or "choice".
    """

    short_edge_length: Sequence[int]
    max_size: int
    sample_style: str = "range"

    def __post_init__(self):
        assert self.sample_style in ("range", "choice"), f"sample_style is {self.sample_style!r}"
        if self.sample_style == "range":
            assert len(self.short_edge_length) == 2, f"a range is two lengths, not {self.short_edge_length}"

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if self.sample_style == "range":
            size = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            return NoOpTransform()
        return ResizeTransform(height, width, *self.get_output_shape(height, width, size, self.max_size))

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """(height, width) after resizing, each rounded to the nearest pixel."""
        scale = float(short_edge_length) / min(oldh, oldw)
        # the shorter side is set, not multiplied: 480 * (800 / 480) need not be 800
        height = float(short_edge_length) if oldh <= oldw else scale * oldh
        width = float(short_edge_length) if oldw < oldh else scale * oldw
        longer = max(height, width)
        if longer > max_size:
            shrink = max_size / longer
            height, width = height * shrink, width * shrink
        return int(height + 0.5), int(width + 0.5)


@dataclass
class RandomCrop(Augmentation):
    """Crop a window at a random place.

    Args:
        crop_type: what ``crop_size`` (height, width) means. "relative": fractions of the image.
            "relative_range": fractions drawn from [crop_size, 1). "absolute": pixels, at most the image.
            "absolute_range": both sides drawn from [crop_size[0], crop_size[1]] pixels, at most the image.
        crop_size: two numbers.
    """

    crop_type: str
    crop_size: Sequence[float]

    def __post_init__(self):
        types = ("relative_range", "relative", "absolute", "absolute_range")
        assert self.crop_type in types, f"INPUT.CROP.TYPE is {self.crop_type!r}, none of {types}"

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = self.get_crop_size((height, width))
        y0 = np.random.randint(height - crop_height + 1)
        x0 = np.random.randint(width - crop_width + 1)
        return CropTransform(x0, y0, crop_width, crop_height, orig_w=width, orig_h=height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the window in an image of ``image_size`` (height, width)."""
        height, width = image_size
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(first, height), min(second, width)
        if self.crop_type == "absolute_range":
            crop_height = np.random.randint(min(height, first), min(height, second) + 1)
            return crop_height, np.random.randint(min(width, first), min(width, second) + 1)
        if self.crop_type == "relative_range":
            low = np.asarray(self.crop_size, dtype=np.float32)
            first, second = low + np.random.rand(2) * (1 - low)
        return int(height * first + 0.5), int(width * second + 0.5)

"""Augmentation: a policy that looks at an image, possibly draws random numbers, and returns a Transform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fvcore.transforms.transform import Transform, TransformList


class AugInput:
    """What augmentations see and change: an image (H, W, C), and where they are given its boxes and classes of pixels.

    Args:
        boxes: (N, 4) XYXY in pixels of the image.
        sem_seg: (H, W) classes.
    """

    def __init__(self, image: np.ndarray, *, boxes: np.ndarray | None = None, sem_seg: np.ndarray | None = None):
        self.image, self.boxes, self.sem_seg = image, boxes, sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply a transform to all of it, in place."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(self, augmentations: Sequence[Augmentation | Transform]) -> TransformList:
        """Equivalent of ``AugmentationList(augmentations)(self)``."""
        return AugmentationList(augmentations)(self)


class Augmentation:
    """Base class. Randomness comes from numpy's global state, so that ``np.random.seed`` repeats a run."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Choose the transform."""
        raise NotImplementedError

    def __call__(self, aug_input: AugInput) -> Transform:
        """Choose a transform, apply it to the input in place, and return it."""
        tfm = self.get_transform(aug_input.image)
        aug_input.transform(tfm)
        return tfm


class AugmentationList(Augmentation):
    """Augmentations, or transforms, one after the other, each seeing the result of those before it."""

    def __init__(self, augs: Sequence[Augmentation | Transform]):
        self.augs = augs

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([self._apply(aug, aug_input) for aug in self.augs])

    @staticmethod
    def _apply(aug: Augmentation | Transform, aug_input: AugInput) -> Transform:
        if isinstance(aug, Augmentation):
            return aug(aug_input)
        aug_input.transform(aug)
        return aug

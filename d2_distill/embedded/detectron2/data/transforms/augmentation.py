"""Augmentation: a policy that looks at an image, possibly draws random numbers, and returns a Transform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fvcore.transforms.transform import Transform, TransformList


class AugInput:
    """What augmentations see and change: an image (H, W, C)."""

    def __init__(self, image: np.ndarray):
        self.image = image


class Augmentation:
    """Base class. Randomness comes from numpy's global state, so that ``np.random.seed`` repeats a run."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Choose the transform."""
        raise NotImplementedError

    def __call__(self, aug_input: AugInput) -> Transform:
        """Choose a transform, apply it to the input in place, and return it."""
        tfm = self.get_transform(aug_input.image)
        aug_input.image = tfm.apply_image(aug_input.image)
        return tfm


class AugmentationList(Augmentation):
    """Augmentations one after the other, each seeing the result of those before it."""

    def __init__(self, augs: Sequence[Augmentation]):
        self.augs = augs

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

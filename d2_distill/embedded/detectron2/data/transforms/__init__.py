"""Transforms (fvcore's and resizing) and random augmentations that choose them."""

from fvcore.transforms.transform import *  # noqa: F401,F403  (Transform, TransformList, HFlipTransform, ...)

from .augmentation import AugInput, Augmentation, AugmentationList  # noqa: F401
from .augmentation_impl import RandomCrop, RandomFlip, ResizeShortestEdge  # noqa: F401
from .transform import ResizeTransform  # noqa: F401

"""The augmentations of a config, which leave thin images at least a pixel of either side."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T


class AtLeastAPixel(T.Augmentation):
    """Another augmentation, whose resizing or crop leaves an image a row and a column.

    Detectron2's resizing rounds the shorter side of an image down to nothing where the longer one is some hundred times as
    long, and fails.

    Args:
        augmentation: what chooses the transform.
    """

    def __init__(self, augmentation: T.Augmentation) -> None:
        super().__init__()
        self.augmentation = augmentation

    def get_transform(self, image: np.ndarray) -> T.Transform:
        chosen = self.augmentation.get_transform(image)
        if isinstance(chosen, T.ResizeTransform) and min(chosen.new_h, chosen.new_w) < 1:
            return T.ResizeTransform(chosen.h, chosen.w, max(chosen.new_h, 1), max(chosen.new_w, 1))
        if isinstance(chosen, T.CropTransform) and min(chosen.h, chosen.w) < 1:
            height, width = image.shape[:2]
            x0, y0 = min(chosen.x0, width - 1), min(chosen.y0, height - 1)
            return T.CropTransform(x0, y0, max(chosen.w, 1), max(chosen.h, 1), orig_w=width, orig_h=height)
        return chosen

    def __repr__(self) -> str:
        return repr(self.augmentation)


def at_least_a_pixel(augmentation: T.Augmentation | T.Transform) -> T.Augmentation | T.Transform:
    """Return :class:`AtLeastAPixel` of what resizes or crops, anything else as it is."""
    may_vanish = isinstance(augmentation, (T.ResizeShortestEdge, T.RandomCrop))
    return AtLeastAPixel(augmentation) if may_vanish else augmentation


def build_augmentation(cfg: CfgNode, *, is_train: bool) -> list[T.Augmentation]:
    """Return what Detectron2 builds of ``INPUT``, but see :class:`AtLeastAPixel`."""
    return [at_least_a_pixel(each) for each in detection_utils.build_augmentation(cfg, is_train)]

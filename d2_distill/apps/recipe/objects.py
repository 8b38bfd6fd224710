"""Sizes of objects and images, and which sizes an image side and a set of anchors reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.records import boxes_xyxy, is_crowd

PERCENTILES = (5, 25, 50, 75, 95)
# An object is reached by an anchor from half to twice its side; so ATSS and max-IoU still match it.
REACH = 2.0


@dataclass(frozen=True)
class Objects:
    """What a recipe is made from.

    Attributes:
        sizes: (R,) side of the square of each object's area, in parts of the longer side of its image.
        longer_sides: (N,) longer side of each image, pixels.
        aspect: median of shorter / longer side of the images.
    """

    sizes: np.ndarray
    longer_sides: np.ndarray
    aspect: float

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> Objects:
        """Measure Detectron2's dataset dicts; crowds are left out."""
        sizes, longer, aspects = [], [], []
        for record in records:
            sides = record["width"], record["height"]
            longer.append(max(sides))
            aspects.append(min(sides) / max(sides))
            boxes = boxes_xyxy([row for row in record["annotations"] if not is_crowd(row)])
            sizes.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)) / max(sides))
        return cls(np.concatenate(sizes), np.array(longer), float(np.median(aspects)))

    def scaled(self, longer_side: int) -> np.ndarray:
        """Return the sizes in pixels of images that are scaled to a longer side."""
        return self.sizes * longer_side

    def percentiles(self, longer_side: int) -> dict[int, float]:
        """Return ``PERCENTILES`` of the sizes in pixels of scaled images."""
        return dict(zip(PERCENTILES, np.percentile(self.scaled(longer_side), PERCENTILES).tolist()))

    def reached(self, longer_side: int, anchors: Sequence[float]) -> float:
        """Return the share of objects that anchors of these sides, ascending, reach."""
        sizes = self.scaled(longer_side)
        return float(((sizes >= anchors[0] / REACH) & (sizes <= anchors[-1] * REACH)).mean())

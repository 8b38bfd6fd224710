"""The anchors of a batch: where they are, which level each belongs to, and which see more than padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from detectron2.structures import Boxes

from .geometry import centers_of


@dataclass(frozen=True)
class AnchorGrid:
    """R anchors over the feature maps of all levels, in the order level, row, column, anchor of the cell.

    Attributes:
        boxes: (R, 4) XYXY in pixels.
        map_sizes: (H, W) of each level's feature map.
        strides: pixels a cell, one a level.
        anchors_per_cell: the same number on every level.
        image_sizes: (height, width) of each image before padding, if anchors that only see padding are left out; None
            if the detector makes no difference.
    """

    boxes: torch.Tensor
    map_sizes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    anchors_per_cell: int
    image_sizes: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def from_levels(
        cls,
        anchors: Sequence[Boxes],
        features: Sequence[torch.Tensor],
        strides: Sequence[int],
        anchors_per_cell: int,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> AnchorGrid:
        """Return the grid of anchors as Detectron2's generators return them.

        Args:
            anchors: one Boxes a level.
            features: the maps (N, C, H, W) that they were generated for.
            strides, anchors_per_cell, image_sizes: see the class.
        """
        return cls(
            boxes=Boxes.cat(list(anchors)).tensor,
            map_sizes=tuple(tuple(feature.shape[-2:]) for feature in features),
            strides=tuple(strides),
            anchors_per_cell=anchors_per_cell,
            image_sizes=None if image_sizes is None else tuple(image_sizes),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    @cached_property
    def valid(self) -> torch.Tensor | None:
        """(N, R) bool, False for anchors of cells that only see the padding of the batch; None if all are alike."""
        if self.image_sizes is None:
            return None
        cells = [
            valid_cells(size, self.map_sizes, self.strides, device=self.boxes.device) for size in self.image_sizes
        ]
        return torch.stack(cells).repeat_interleave(self.anchors_per_cell, dim=1)

    @cached_property
    def level_sizes(self) -> list[int]:
        """Number of anchors of each level."""
        return [height * width * self.anchors_per_cell for height, width in self.map_sizes]

    @cached_property
    def centers(self) -> torch.Tensor:
        """(R, 2) XY in pixels."""
        return centers_of(self.boxes)

    @cached_property
    def stride(self) -> torch.Tensor:
        """(R,) pixels a cell at each anchor."""
        return self.per_anchor(self.strides)

    def per_anchor(self, values: Sequence[float]) -> torch.Tensor:
        """Spread one number a level over the level's anchors: (R,)."""
        # Filled on the device: an upload would make the host wait.
        return torch.cat([self.boxes.new_full((size,), value) for size, value in zip(self.level_sizes, values)])

    def split(self, values: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, ...]:
        """Split values of R anchors along ``dim`` into those of each level."""
        return values.split(self.level_sizes, dim=dim)

    def level_boxes(self) -> list[Boxes]:
        """Return the anchors as Detectron2's detectors take them, one Boxes a level."""
        return [Boxes(boxes) for boxes in self.split(self.boxes, dim=0)]

    def join(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate prediction maps (N, A*K, H, W), one a level, to (N, R, K) in the order of the anchors."""
        return torch.cat([self.flatten(x) for x in maps], dim=1)

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """Return one level's map (N, A*K, H, W) as rows (N, H*W*A, K)."""
        images, _, height, width = x.shape
        x = x.view(images, self.anchors_per_cell, -1, height, width)
        return x.permute(0, 3, 4, 1, 2).flatten(start_dim=1, end_dim=3)


def valid_cells(
    image_size: tuple[int, int],
    map_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    size_divisibility: int = 32,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return which cells (i, j) have i * stride < height and j * stride < width of the image.

    The image's size is rounded up to a multiple of ``size_divisibility`` first, as if it were the only one
    of its batch: what an image trains does not depend on its neighbors' sizes.

    Args:
        image_size: height and width in pixels, before padding.
        map_sizes: (H, W) of each level's feature map.
        strides: pixels a cell, one a level.

    Returns:
        (sum of H * W,) bool, levels concatenated, each row-major.
    """
    height, width = (-(-size // size_divisibility) * size_divisibility for size in image_size)
    masks = []
    for (rows, columns), stride in zip(map_sizes, strides):
        inside_y = torch.arange(rows, device=device) * stride < height
        inside_x = torch.arange(columns, device=device) * stride < width
        masks.append((inside_y[:, None] & inside_x).flatten())
    return torch.cat(masks)

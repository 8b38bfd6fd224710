"""Axis-aligned boxes: their formats, the ``Boxes`` container and pairwise measures between two sets."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou, clip_boxes_to_image


class BoxMode(IntEnum):
    """How the numbers of a box are to be read; the values are what annotation files hold."""

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(box, from_mode: "BoxMode", to_mode: "BoxMode"):
        """Convert between XYXY_ABS and XYWH_ABS.

        Args:
            box: one box as list or tuple of 4 numbers, or an (..., 4) array or tensor.

        Returns:
            A new object of the type of ``box``; ``box`` itself if both modes are the same.

        Raises:
            NotImplementedError: relative and rotated boxes.
        """
        if from_mode == to_mode:
            return box
        if {from_mode, to_mode} != {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
            names = f"{BoxMode(from_mode).name} to {BoxMode(to_mode).name}"
            raise NotImplementedError(f"The embedded Detectron2 does not convert boxes from {names}.")
        if isinstance(box, (list, tuple)):
            # In float32, as all boxes are from here on.
            return type(box)(BoxMode.convert(torch.tensor(box), from_mode, to_mode).tolist())
        box = box.copy() if isinstance(box, np.ndarray) else box.clone()
        box[..., 2:] += box[..., :2] if to_mode == BoxMode.XYXY_ABS else -box[..., :2]
        return box


class Boxes:
    """N boxes as an (N, 4) float32 tensor of absolute XYXY coordinates.

    Attributes:
        tensor: the coordinates; ``x1, y1`` is the upper left corner.
    """

    def __init__(self, tensor: Tensor):
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.size(-1) == 4, f"Boxes must be (N, 4), not {tuple(tensor.shape)}"
        self.tensor = tensor

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]) if boxes_list else torch.empty(0))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, device) -> "Boxes":
        return Boxes(self.tensor.to(device=device))

    def __getitem__(self, item: int | slice | Tensor) -> "Boxes":
        """The selected boxes; an int selects a set of one."""
        selected = self.tensor[[item] if isinstance(item, int) else item]
        assert selected.dim() == 2, f"Indexing Boxes with {item} does not give a set of boxes"
        return Boxes(selected)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    def area(self) -> Tensor:
        """(N,) areas in square pixels."""
        return box_area(self.tensor)

    def get_centers(self) -> Tensor:
        """(N, 2) centres (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def clip(self, box_size: tuple[int, int]) -> None:
        """Move corners outside an image of ``(height, width)`` onto its border."""
        assert torch.isfinite(self.tensor).all(), "Boxes to be clipped hold an infinite number or NaN."
        self.tensor = clip_boxes_to_image(self.tensor, box_size)

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the coordinates in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """(N,) bool: both sides are longer than ``threshold``."""
        return (self.tensor[:, 2:] - self.tensor[:, :2] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """(N,) bool: the box leaves an image of ``(height, width)`` by less than the threshold."""
        far_corner = self.tensor.new_tensor(box_size[::-1]) + boundary_threshold
        return ((self.tensor[:, :2] >= -boundary_threshold) & (self.tensor[:, 2:] < far_corner)).all(dim=1)


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """(N, M) intersection over union; 0 for two boxes without area."""
    return box_iou(boxes1.tensor, boxes2.tensor).nan_to_num(0.0)


def pairwise_point_box_distance(points: Tensor, boxes: Boxes) -> Tensor:
    """(P, M, 4) distances of (P, 2) points to the left, top, right, bottom sides; all positive if inside."""
    return torch.cat((points[:, None] - boxes.tensor[:, :2], boxes.tensor[:, 2:] - points[:, None]), dim=-1)

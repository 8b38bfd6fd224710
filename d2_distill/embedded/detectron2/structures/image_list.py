"""A batch of images of different sizes in one padded tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ImageList:
    """Padded images and their sizes before padding.

    Attributes:
        tensor: (N, C, H, W), images at the upper left.
        image_sizes: N pairs (height, width).
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image ``idx`` without its padding, a view."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    @staticmethod
    def from_tensors(
        tensors: list[Tensor], size_divisibility: int = 0, pad_value: float = 0.0
    ) -> "ImageList":
        """Pad (..., H_i, W_i) images at the right and bottom to one size.

        Args:
            size_divisibility: round both sides up to a multiple of it, if above 1.
        """
        divisor = max(size_divisibility, 1)
        image_sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height, width = ((max(sides) + divisor - 1) // divisor * divisor for sides in zip(*image_sizes))
        batch = [
            F.pad(image, (0, width - w, 0, height - h), value=pad_value)
            for image, (h, w) in zip(tensors, image_sizes)
        ]
        return ImageList(torch.stack(batch), image_sizes)

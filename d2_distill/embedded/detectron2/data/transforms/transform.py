"""ResizeTransform: resizing as Pillow does it (with antialiasing)."""

from __future__ import annotations

import numpy as np
from fvcore.transforms.transform import Transform
from PIL import Image


class ResizeTransform(Transform):
    """Resize uint8 images (h, w), (h, w, 1) or (h, w, 3), and coordinates in them, to (new_h, new_w)."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        assert img.shape[:2] == (self.h, self.w), f"made for {(self.h, self.w)}, not {img.shape[:2]}"
        # Pillow knows gray images only without a channel axis
        plane = Image.fromarray(img[:, :, 0] if img.shape[2:] == (1,) else img)
        resized = np.asarray(plane.resize((self.new_w, self.new_h), Image.BILINEAR))
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * (self.new_w / self.w, self.new_h / self.h)

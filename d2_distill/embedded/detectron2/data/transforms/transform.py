"""ResizeTransform: resizing as Pillow does it (with antialiasing)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import Transform
from PIL import Image

_MODES = {Image.NEAREST: "nearest", Image.BILINEAR: "bilinear", Image.BICUBIC: "bicubic"}


class ResizeTransform(Transform):
    """Resize images (h, w) or (h, w, c), and coordinates in them, to (new_h, new_w).

    Pillow resizes uint8 images, PyTorch (without antialiasing) those of other types.

    Args:
        interp: how images are resized, a filter of Pillow; masks are always resized to the nearest pixel.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.interp = Image.BILINEAR if interp is None else interp

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        assert img.shape[:2] == (self.h, self.w), f"made for {(self.h, self.w)}, not {img.shape[:2]}"
        interp = self.interp if interp is None else interp
        if img.dtype == np.uint8:
            # Pillow knows gray images only without a channel axis
            plane = Image.fromarray(img[:, :, 0] if img.shape[2:] == (1,) else img)
            resized = np.asarray(plane.resize((self.new_w, self.new_h), interp))
        else:
            planes = torch.from_numpy(np.ascontiguousarray(img)).reshape(self.h, self.w, -1).permute(2, 0, 1)[None]
            mode = _MODES[interp]
            corners = None if mode == "nearest" else False
            resized = F.interpolate(planes, (self.new_h, self.new_w), mode=mode, align_corners=corners)[0]
            resized = resized.permute(1, 2, 0).numpy()
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Image.NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * (self.new_w / self.w, self.new_h / self.h)

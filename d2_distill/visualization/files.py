"""Pictures are written complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image


def write_picture(picture: np.ndarray, target: Path) -> None:
    """Write an RGB picture; the file appears complete or not at all."""
    partial = partial_path(target)
    try:
        Image.fromarray(picture).save(partial, quality=95)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """Where a file is written before it gets its name; of the same format by its suffix."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")

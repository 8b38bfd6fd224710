"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ...whole_files import whole_file


def write_picture(picture: np.ndarray, target: Path) -> None:
    """Write an RGB picture; the file appears complete or not at all."""
    with whole_file(target) as path:
        Image.fromarray(picture).save(path, quality=95)

"""Reads pictures of any depth; Detectron2 by itself cuts pixels of more than 8 bits off at 255."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError

ORIENTATION = 0x0112  # of EXIF
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # of TIFF
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
_TURNS = {
    2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
    6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90,
}  # fmt: skip
_read_by_detectron2 = detection_utils.read_image


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read a picture as Detectron2's function of this name does, but scale one of more than 8 bits by its range.

    Args:
        file_name: path, opened through the PathManager.
        format: "BGR", a Pillow mode ("RGB", "L"), or None for the file's own mode.

    Returns:
        (H, W, C) uint8 array, upright according to its EXIF orientation; (H, W, 1) for "L".

    Raises:
        UserError: the range of the picture's pixels is not known.
    """
    with PathManager.open(file_name, "rb") as file:
        picture = Image.open(file)
        if not is_deep(picture):
            return _read_by_detectron2(file_name, format)
        turn = _TURNS.get(orientation(picture))
        picture = _in_8_bits(picture)
    if turn is not None:
        picture = picture.transpose(turn)
    if format is not None:
        picture = picture.convert("RGB" if format == "BGR" else format)
    array = np.asarray(picture)
    return array[:, :, None] if format == "L" else array  # all channels of a gray picture are alike: BGR is RGB


def use_everywhere() -> None:
    """Let Detectron2's mappers, and those of users, read pictures by :func:`read_image`."""
    detection_utils.read_image = read_image


def is_deep(picture: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits a channel as Pillow opens it; it takes deep colors to 8 itself."""
    return picture.mode.startswith(("I", "F"))


def orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none."""
    try:
        # Pillow would decode a PNG to look for metadata after its pixels.
        exif: Any = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
    except Exception:  # whatever a parser of broken metadata raises
        return 1
    return exif.get(ORIENTATION, 1)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    highest = _highest_value(picture)
    pixels = np.asarray(picture).astype(np.int64)
    return Image.fromarray(((pixels * 255 + highest // 2) // highest).astype(np.uint8))


def _highest_value(picture: Image.Image) -> int:
    """The value of white, by the depth of the file."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    is_unsigned = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
    is_short = picture.mode.startswith("I;") or picture.format in ("PNG", "PPM") or (picture.format == "TIFF" and bits <= 16)
    if picture.mode.startswith("F") or not is_unsigned or not is_short:
        kind = "floating-point" if picture.mode.startswith("F") else "signed or 32-bit"
        raise UserError(f"its pixels are {kind} numbers, of which it is not known what is white: convert it to 8 or 16 bits")
    return 2**bits - 1

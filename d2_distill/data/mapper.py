"""Maps a data set record to a training sample, and says which image file is at fault if it cannot."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError
from .augmentation import at_least_a_pixel
from .pictures import SIDEWAYS, orientation, read_image


class SampleError(UserError):
    """What cannot be made a sample.

    Its text stays one sentence when a DataLoader worker raised it: torch re-raises the type in the main
    process, but with the worker's traceback, which ends in ``SampleError: <sentence>``, as its argument.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class ImageFileError(SampleError):
    """An image file that cannot be used."""


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's mapper, but it names an unusable image, and does not truncate integer boxes.

    Images that resizing would leave without a row or column keep one. Detectron2 transforms a box in the type it has, so that resizing would round whole-numbered boxes down.

    Raises:
        ImageFileError: the file is missing, corrupt or truncated, or its size is not the annotated one.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        return {**arguments, "augmentations": [*map(at_least_a_pixel, arguments["augmentations"])]}

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            return super().__call__(_with_float_boxes(dataset_dict))
        except Exception:
            check_image_file(dataset_dict)
            raise  # the image is fine: not the data's fault


def _with_float_boxes(dataset_dict: dict) -> dict:
    if "annotations" not in dataset_dict:
        return dataset_dict
    annotations = [{**row, "bbox": [float(x) for x in row["bbox"]]} for row in dataset_dict["annotations"]]
    return {**dataset_dict, "annotations": annotations}


def check_image_file(dataset_dict: dict, image_format: str = "BGR") -> np.ndarray:
    """Decode the image of a record: (H, W, 3) uint8 in "BGR", or in another format as :func:`.pictures.read_image` has it.

    Raises:
        ImageFileError: it cannot be decoded, or has another size than the record says.
    """
    file_name = dataset_dict["file_name"]
    try:
        image = read_image(file_name, format=image_format)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError ...
        raise ImageFileError(
            f"The image {file_name} cannot be read ({error}); restore it or remove it from the data set."
        ) from None
    try:
        check_image_size(copy.copy(dataset_dict), image)
    except SizeMismatchError:
        fault = size_sentence(dataset_dict, image.shape[1], image.shape[0])
        raise ImageFileError(f"{fault}; correct the annotation or restore the file.") from None
    return image


def size_sentence(dataset_dict: dict, width: int, height: int) -> str:
    """That an image has another size, in pixels, than its record says; without a full stop."""
    path, said = dataset_dict["file_name"], (dataset_dict["width"], dataset_dict["height"])
    turned = ""
    if said == (height, width) and _is_turned(path):
        turned = ", which is that of the picture before its EXIF orientation turns it"
    return f"The image {path} has {width} x {height} pixels, its annotation says {said[0]} x {said[1]}{turned}"


def _is_turned(path: str) -> bool:
    """Whether an image file's metadata swap its width and height."""
    with contextlib.suppress(OSError), PathManager.open(path, "rb") as file:
        return orientation(Image.open(file)) in SIDEWAYS
    return False

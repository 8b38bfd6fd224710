"""Images and annotations of one dataset dict: reading, transforming, conversion to Instances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from . import transforms as T


class SizeMismatchError(ValueError):
    """An image has another size than its annotations say."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image, upright according to its EXIF orientation.

    Args:
        file_name: path, opened through the PathManager.
        format: "BGR", a Pillow mode ("RGB", "L"), or None for the file's own mode.

    Returns:
        (H, W, C) uint8 array; (H, W, 1) for "L".
    """
    with PathManager.open(file_name, "rb") as f:
        image = ImageOps.exif_transpose(Image.open(f))
        if format is not None:
            image = image.convert("RGB" if format == "BGR" else format)
        array = np.asarray(image)
    if format == "BGR":
        array = array[:, :, ::-1]
    elif format == "L":
        array = array[:, :, None]
    return array


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare the (H, W, C) image with the dict's height and width, or fill them in where absent.

    Raises:
        SizeMismatchError: they differ.
    """
    height, width = image.shape[:2]
    expected = (dataset_dict.setdefault("width", width), dataset_dict.setdefault("height", height))
    if expected != (width, height):
        raise SizeMismatchError(
            f"Image {dataset_dict.get('file_name', '')} is {width}x{height} pixels (width x height), but its "
            f"annotations say {expected[0]}x{expected[1]}; mend the annotations or the image."
        )


def transform_instance_annotations(
    annotation: dict[str, Any], transforms: T.Transform, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Transform the ``bbox`` of an annotation in place: it becomes XYXY, clipped to the new image.

    Args:
        transforms: what was applied to the image.
        image_size: (height, width) of the transformed image.
    """
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box], dtype=np.float64))[0]
    height, width = image_size
    annotation["bbox"] = np.clip(box, 0, (width, height, width, height))
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return annotation


def annotations_to_instances(annos: list[dict[str, Any]], image_size: tuple[int, int]) -> Instances:
    """Ground truth of an image of size (height, width): gt_boxes (N, 4) and gt_classes (N,) int64."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    return Instances(
        image_size,
        gt_boxes=Boxes(np.array(boxes, dtype=np.float32)),
        gt_classes=torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64))


def filter_empty_instances(instances: Instances) -> Instances:
    """Those instances whose gt_boxes have a width and a height."""
    return instances[instances.gt_boxes.nonempty(threshold=1e-5)]


def build_augmentation(cfg, is_train: bool) -> list[T.Augmentation]:
    """In training the crop and the flip that INPUT asks for, before and after resizing; else resizing."""
    given = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge((given.MIN_SIZE_TEST,), given.MAX_SIZE_TEST, "choice")]
    augmentations = [
        T.ResizeShortestEdge(given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN, given.MIN_SIZE_TRAIN_SAMPLING)]
    if given.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(given.CROP.TYPE, given.CROP.SIZE))
    if given.RANDOM_FLIP != "none":
        augmentations.append(T.RandomFlip(
            horizontal=given.RANDOM_FLIP == "horizontal", vertical=given.RANDOM_FLIP == "vertical"))
    return augmentations

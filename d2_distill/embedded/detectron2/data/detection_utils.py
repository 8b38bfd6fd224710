"""Images and annotations of one dataset dict: reading, transforming, conversion to Instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps
from pycocotools import mask as masks_of_coco

from . import transforms as T
from .catalog import MetadataCatalog


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
    annotation: dict[str, Any],
    transforms: T.Transform,
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | None = None,
) -> dict[str, Any]:
    """Transform an annotation in place.

    ``bbox`` becomes XYXY, clipped to the new image. Polygons of a ``segmentation`` stay polygons, run lengths become a mask
    (H, W) uint8. ``keypoints`` become (K, 3), see :func:`transform_keypoint_annotations`.

    Args:
        transforms: what was applied to the image.
        image_size: (height, width) of the transformed image.
        keypoint_hflip_indices: see :func:`create_keypoint_hflip_indices`.
    """
    transforms = T.TransformList([transforms]) if not isinstance(transforms, T.TransformList) else transforms
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box], dtype=np.float64))[0]
    height, width = image_size
    annotation["bbox"] = np.clip(box, 0, (width, height, width, height))
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transformed_mask(annotation["segmentation"], transforms, image_size)
    if "keypoints" in annotation:
        annotation["keypoints"] = transform_keypoint_annotations(
            annotation["keypoints"], transforms, image_size, keypoint_hflip_indices)
    return annotation


def _transformed_mask(segmentation: Any, transforms: T.TransformList, image_size: tuple[int, int]) -> Any:
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
        return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(masks_of_coco.decode(segmentation))
        assert tuple(mask.shape[:2]) == tuple(image_size), f"The mask is {mask.shape}, the image {image_size}."
        return mask
    raise ValueError(f"A segmentation is a list of polygons or run lengths of COCO, not {type(segmentation)}.")


def transform_keypoint_annotations(
    keypoints: Any,
    transforms: T.TransformList,
    image_size: tuple[int, int],
    keypoint_hflip_indices: np.ndarray | None = None,
) -> np.ndarray:
    """Transform keypoints (K, 3) of x, y and visibility; those that are not labelled or left the image become zeros.

    Raises:
        ValueError: the image was flipped, and which keypoints are left and right is not known, or not of so many.
    """
    points = np.asarray(keypoints, dtype=np.float64).reshape(-1, 3)
    places = transforms.apply_coords(points[:, :2])
    inside = ((places >= 0) & (places <= np.array(image_size[::-1]))).all(axis=1)
    points = np.concatenate([places, np.where(inside, points[:, 2], 0)[:, None]], axis=1)
    flips = sum(isinstance(each, T.HFlipTransform) for each in transforms.transforms)
    if keypoint_hflip_indices is not None and len(keypoint_hflip_indices) != len(points):
        raise ValueError(f"There are {len(points)} keypoints, but flip indices of {len(keypoint_hflip_indices)}.")
    if flips % 2:
        if keypoint_hflip_indices is None:
            raise ValueError("To flip keypoints, their flip indices are needed: which are left and which are right.")
        points = points[np.asarray(keypoint_hflip_indices, dtype=np.int32)]
    points[points[:, 2] == 0] = 0
    return points


def create_keypoint_hflip_indices(dataset_names: str | Sequence[str]) -> list[int]:
    """For each keypoint of data sets the number of its mirror image, by their ``keypoint_names`` and ``keypoint_flip_map``.

    Raises:
        ValueError: the data sets differ in them.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    metadata = [MetadataCatalog.get(name) for name in names]
    for field in ("keypoint_names", "keypoint_flip_map"):
        if any(getattr(each, field) != getattr(metadata[0], field) for each in metadata):
            raise ValueError(f"The data sets {', '.join(names)} differ in their {field}.")
    keypoints, pairs = metadata[0].keypoint_names, dict(metadata[0].keypoint_flip_map)
    mirrored = {**pairs, **{right: left for left, right in pairs.items()}}
    return [keypoints.index(mirrored.get(name, name)) for name in keypoints]


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

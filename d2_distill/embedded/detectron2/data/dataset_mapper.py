"""DatasetMapper: dataset dict -> what a detector is fed."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable

from . import detection_utils as utils
from . import transforms as T


class DatasetMapper:
    """Read the image, augment it and its boxes, and convert both to tensors.

    Called with a dataset dict it returns a copy with ``image``, (C, H, W) uint8, and without ``annotations``. An image that
    ``sem_seg_file_name`` names is augmented in the same way and becomes ``sem_seg``, (H, W) int64.
    In training it has ``instances`` instead: gt_boxes and gt_classes, without crowds and without boxes that
    the augmentation emptied.
    """

    @configurable
    def __init__(self, is_train: bool, *, augmentations: list[T.Augmentation], image_format: str):
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        purpose = "training" if is_train else "testing"
        logging.getLogger(__name__).info(f"Images for {purpose} go through {augmentations}")

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "augmentations": utils.build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)

        sem_seg = None
        if "sem_seg_file_name" in dataset_dict:
            sem_seg = utils.read_image(dataset_dict.pop("sem_seg_file_name"), "L").squeeze(2)
        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        # Pillow's arrays are read-only, which torch warns about: always copy
        dataset_dict["image"] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))

        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.from_numpy(aug_input.sem_seg.astype("int64"))

        annotations = dataset_dict.pop("annotations", None)
        if not self.is_train or annotations is None:
            return dataset_dict
        annotations = [
            utils.transform_instance_annotations(_with_box_only(annotation), transforms, image.shape[:2])
            for annotation in annotations
            if annotation.get("iscrowd", 0) == 0
        ]
        instances = utils.annotations_to_instances(annotations, image.shape[:2])
        dataset_dict["instances"] = utils.filter_empty_instances(instances)
        return dataset_dict


def _with_box_only(annotation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in annotation.items() if name not in ("segmentation", "keypoints")}

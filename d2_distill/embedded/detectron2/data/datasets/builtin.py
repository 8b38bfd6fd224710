"""Registers COCO 2014/2017 and Pascal VOC 2007/2012 below $DETECTRON2_DATASETS (default: datasets)."""

from __future__ import annotations

import os

from ..catalog import MetadataCatalog
from .coco import register_coco_instances
from .pascal_voc import register_pascal_voc

# name -> (images, annotations), below the folder "coco"
_COCO_INSTANCES = {
    "coco_2014_train": ("train2014", "instances_train2014.json"),
    "coco_2014_val": ("val2014", "instances_val2014.json"),
    "coco_2014_minival": ("val2014", "instances_minival2014.json"),
    "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014.json"),
    "coco_2017_train": ("train2017", "instances_train2017.json"),
    "coco_2017_val": ("val2017", "instances_val2017.json"),
    "coco_2017_test": ("test2017", "image_info_test2017.json"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017.json"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100.json"),
}
_COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # numbered in 1..90, never annotated


def _register_all(root: str) -> None:
    used_ids = [i for i in range(1, 91) if i not in _COCO_UNUSED_IDS]
    id_map = {id_: index for index, id_ in enumerate(used_ids)}
    metadata = {"thing_classes": list(_COCO_CLASSES), "thing_dataset_id_to_contiguous_id": id_map}
    for name, (images, json_file) in _COCO_INSTANCES.items():
        json_file = os.path.join(root, "coco/annotations", json_file)
        register_coco_instances(name, metadata, json_file, os.path.join(root, "coco", images))
    for year in (2007, 2012):
        for split in ("trainval", "train", "val", "test"):
            if (year, split) == (2012, "test"):
                continue  # its annotations were never published
            name = f"voc_{year}_{split}"
            register_pascal_voc(name, os.path.join(root, f"VOC{year}"), split, year)
            MetadataCatalog.get(name).evaluator_type = "pascal_voc"


_register_all(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))

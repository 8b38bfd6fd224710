"""Pascal VOC: reading of the XML annotations and registration."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_Object = tuple[str, list[float], bool]  # class, [xmin, ymin, xmax, ymax] as written, whether difficult


def read_image_ids(dirname: str, split: str) -> list[str]:
    with PathManager.open(os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")) as f:
        return [line.split()[0] for line in f if line.strip()]


def read_annotation(dirname: str, image_id: str) -> tuple[tuple[int, int], list[_Object]]:
    """(height, width) of an image, and its objects."""
    with PathManager.open(os.path.join(dirname, "Annotations", f"{image_id}.xml")) as f:
        tree = ElementTree.parse(f)
    objects = []
    for item in tree.findall("object"):
        corners = [float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        objects.append((item.findtext("name"), corners, item.findtext("difficult", "0").strip() == "1"))
    return (int(tree.findtext("size/height")), int(tree.findtext("size/width"))), objects


def load_voc_instances(dirname: str, split: str, class_names: Sequence[str]) -> list[dict]:
    """Dataset dicts of one split of a folder with Annotations, ImageSets and JPEGImages.

    The files' boxes are 1-based pixel indices with both ends included; taking 1 from xmin and ymin makes them
    continuous coordinates. Objects marked difficult are kept.
    """
    dicts = []
    for image_id in read_image_ids(dirname, split):
        (height, width), objects = read_annotation(dirname, image_id)
        annotations = [
            {
                "category_id": class_names.index(name),
                "bbox": [xmin - 1.0, ymin - 1.0, xmax, ymax],
                "bbox_mode": BoxMode.XYXY_ABS,
            }
            for name, (xmin, ymin, xmax, ymax), _ in objects
        ]
        dicts.append({
            "file_name": os.path.join(dirname, "JPEGImages", f"{image_id}.jpg"),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
        })
    return dicts


def register_pascal_voc(
    name: str, dirname: str, split: str, year: int, class_names: Sequence[str] = CLASS_NAMES
) -> None:
    """Register one split; ``year`` (2007 or 2012) decides the AP formula that the evaluator uses."""
    DatasetCatalog.register(name, lambda: load_voc_instances(dirname, split, class_names))
    MetadataCatalog.get(name).set(thing_classes=list(class_names), dirname=dirname, year=year, split=split)

"""COCO JSON: reading and registration."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..catalog import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


def load_coco_json(json_file: str, image_root: str, dataset_name: str) -> list[dict]:
    """Dataset dicts of a COCO detection file, in the order of the image ids.

    Category ids, sorted, are mapped to 0..K-1, which the data set's metadata tell as ``thing_classes`` and
    ``thing_dataset_id_to_contiguous_id``. Masks are not read, but annotations whose polygons are all too
    short to be a polygon are left out.

    Args:
        image_root: folder that the files' ``file_name`` are relative to.
        dataset_name: a registered name.

    Raises:
        AssertionError: annotation ids repeat, or an annotation has ``ignore`` set.
        KeyError: an annotation's category is not among the file's categories.
        ValueError: an annotation has an empty bbox.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(PathManager.get_local_path(json_file))
    category_ids = sorted(coco.getCatIds())
    id_map = {category_id: index for index, category_id in enumerate(category_ids)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[category["name"] for category in coco.loadCats(category_ids)],
        thing_dataset_id_to_contiguous_id=id_map,
    )
    if "minival" not in json_file:  # COCO's own minival files number some annotations twice
        ids = [annotation["id"] for annotation in coco.dataset.get("annotations", ())]
        assert len(set(ids)) == len(ids), f"Annotation ids in '{json_file}' repeat."

    dicts = []
    dropped = 0
    for image_id in sorted(coco.imgs):
        image = coco.imgs[image_id]
        usable = [row for row in coco.imgToAnns[image_id] if not _has_only_broken_polygons(row)]
        dropped += len(coco.imgToAnns[image_id]) - len(usable)
        dicts.append({
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image_id,
            "annotations": [_converted(row, id_map, json_file) for row in usable],
        })
    logger.info(f"{json_file} describes {len(dicts)} images.")
    if dropped:
        logger.warning(f"Left out {dropped} annotations of {json_file} without a valid polygon.")
    return dicts


def _has_only_broken_polygons(row: dict[str, Any]) -> bool:
    polygons = row.get("segmentation")
    if not polygons or isinstance(polygons, dict):  # none, or run-length encoded
        return False
    return not any(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in polygons)


def _converted(row: dict[str, Any], id_map: dict[int, int], json_file: str) -> dict[str, Any]:
    """An annotation of the file as one of a dataset dict."""
    assert row.get("ignore", 0) == 0, f"'ignore' in '{json_file}' is not supported."
    if len(row["bbox"]) == 0:
        raise ValueError(f"An annotation of image {row['image_id']} in '{json_file}' has an empty bbox.")
    if row["category_id"] not in id_map:
        raise KeyError(f"Category {row['category_id']} is not among the categories of '{json_file}'.")
    kept = {key: row[key] for key in ("iscrowd", "bbox") if key in row}
    return {**kept, "bbox_mode": BoxMode.XYWH_ABS, "category_id": id_map[row["category_id"]]}


def register_coco_instances(name: str, metadata: dict[str, Any], json_file: str, image_root: str) -> None:
    """Register a COCO detection file; ``metadata`` (may be empty) is added to the data set's metadata."""
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )

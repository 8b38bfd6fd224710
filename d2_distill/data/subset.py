"""Some images of a data set, evenly spread; for an evaluation, as if they were all of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

_ANNOTATIONS, _SPLITS = "Annotations", os.path.join("ImageSets", "Main")


def evenly_spread(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of the records, or all if there are fewer."""
    count = min(count, len(records))
    return [records[index * len(records) // count] for index in range(count)]


@contextlib.contextmanager
def spread_subset(name: str, count: int) -> Iterator[str]:
    """The name, while inside, of a data set of so many images of another, evenly spread; of all if there are fewer.

    Evaluators read annotation files, so it gets some of its own, in a temporary folder.

    Args:
        name: registered, of a COCO annotation file or a Pascal VOC folder.
    """
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    chosen, subset = evenly_spread(records, count), f"{name}_spread_{count}"
    with tempfile.TemporaryDirectory() as folder:
        is_voc = metadata.get("evaluator_type", "coco") == "pascal_voc"
        facts = {key: value for key, value in vars(metadata).items() if key != "name"}
        facts.update((_voc_folder if is_voc else _coco_file)(chosen, facts, folder))
        DatasetCatalog.register(subset, lambda: chosen)
        MetadataCatalog.get(subset).set(**facts)
        try:
            yield subset
        finally:
            DatasetCatalog.remove(subset)
            MetadataCatalog.remove(subset)


def _coco_file(records: Sequence[dict[str, Any]], facts: dict[str, Any], folder: str) -> dict[str, str]:
    with open(facts["json_file"], encoding="utf-8") as file:
        content = json.load(file)
    ids = {record["image_id"] for record in records}
    content["images"] = [row for row in content["images"] if row["id"] in ids]
    # Files to train on may lack what the evaluation reads.
    content["annotations"] = [
        {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row}
        for row in content["annotations"] if row["image_id"] in ids
    ]
    path = os.path.join(folder, "instances.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return {"json_file": path}


def _voc_folder(records: Sequence[dict[str, Any]], facts: dict[str, Any], folder: str) -> dict[str, str]:
    for name in (_ANNOTATIONS, _SPLITS):
        os.makedirs(os.path.join(folder, name))
    ids = [record["image_id"] for record in records]
    for image_id in ids:
        name = os.path.join(_ANNOTATIONS, f"{image_id}.xml")
        shutil.copyfile(os.path.join(facts["dirname"], name), os.path.join(folder, name))
    with open(os.path.join(folder, _SPLITS, f"{facts['split']}.txt"), "w", encoding="utf-8") as file:
        file.write("\n".join(ids))
    return {"dirname": folder}

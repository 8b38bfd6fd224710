"""Small data sets of real image files in COCO and Pascal VOC layout, made where a test wants them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from d2_distill.config.keys import get_distill_cfg

CLASSES = ("cat", "dog")
WIDE, TALL = (30, 20), (20, 30)  # (width, height)
_VOC_OBJECT = (
    "<object><name>{}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def small_cfg(**data):
    """The config of a run on small images; keywords are merged, with ``__`` for the dots."""
    cfg = get_distill_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (24, 32, 40), 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 7
    for key, value in data.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_content(sizes, classes=CLASSES) -> dict:
    """One box of 8 x 6 at (2, 3) in each image but every fifth, of the classes in turn; ids 10, 20, ..."""
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes)
    ]
    annotations = [
        {"id": 1 + i, "image_id": 100 + i, "category_id": 10 * (1 + i % len(classes)), "bbox": [2, 3, 8, 6],
         "area": 48, "iscrowd": 0}
        for i in range(len(sizes)) if i % 5 != 4
    ]
    categories = [{"id": 10 * (1 + i), "name": name} for i, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path, sizes=(WIDE, TALL, WIDE), classes=CLASSES, edit=None, name="set") -> tuple:
    """Write images and annotation file; ``edit`` changes the content first.

    Returns:
        A row of ``DATASETS.COCO``; its name is unique to the test.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        write_image(folder / "images" / f"{i}.png", width, height, seed=i)
    content = coco_content(sizes, classes)
    if edit:
        edit(content)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return (f"{folder.name}_{name}", str(folder / f"{name}.json"), str(folder / "images"))


def write_voc(folder: Path, objects=([("cat", 3, 4, 10, 9)], [("dog", 3, 4, 10, 9)]), split="train") -> tuple:
    """Write images of 30 x 20 with the given objects (name, xmin, ymin, xmax, ymax).

    Returns:
        A row of ``DATASETS.VOC``; its name is unique to the test.
    """
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(objects):
        write_image(folder / "JPEGImages" / f"{i}.jpg", 30, 20, seed=i)
        body = "".join(_VOC_OBJECT.format(*row) for row in rows)
        size = "<size><width>30</width><height>20</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{i}.xml").write_text(f"<annotation>{size}{body}</annotation>")
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(map(str, range(len(objects)))))
    return (f"{folder.name}_voc", str(folder), split, CLASSES, 2012)

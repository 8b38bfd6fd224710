"""Made-up detection data: registration for the time of a block, VOC folders, model outputs."""

from __future__ import annotations

import contextlib
from itertools import groupby

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances


@contextlib.contextmanager
def registered(name, register, *args, **kwargs):
    """``register(name, ...)``, undone when the block ends."""
    register(name, *args, **kwargs)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_voc(folder, split, image_ids, size, objects):
    """A VOC folder without pictures.

    Args:
        size: (height, width) of all images.
        objects: (image id, class name, [xmin, ymin, xmax, ymax], difficult) each.
    """
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(image_ids) + "\n")
    for image_id in image_ids:
        lines = [f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"]
        for owner, name, box, difficult in objects:
            if owner == image_id:
                corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
                lines.append(
                    f"<object><name>{name}</name><pose>Frontal</pose><truncated>0</truncated>"
                    f"<difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"
                )
        (folder / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")


def outputs_of(detections):
    """(image id, XYXY box, score, class) rows, sorted by image -> (input dict, output dict) of each image."""
    for image_id, rows in groupby(detections, key=lambda row: row[0]):
        rows = list(rows)
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor([row[1] for row in rows]))
        instances.scores = torch.tensor([row[2] for row in rows])
        instances.pred_classes = torch.tensor([row[3] for row in rows])
        yield {"image_id": image_id}, {"instances": instances}


def empty_output():
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.zeros(0, 4))
    instances.scores = torch.zeros(0)
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    return {"instances": instances}

"""What data sets consist of, as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from ...data.records import boxes_xyxy, is_crowd
from .inspection import Inspection

# COCO's bounds of small, medium and large, in square pixels of the image as it is; here of boxes, not of masks.
AREA_BOUNDS = (32**2, 96**2)


def set_table(inspections: Sequence[Inspection]) -> str:
    """A row each: images, boxes, their sizes by COCO's bounds, and image sizes."""
    headers = (
        "data set", "images", "without object", "boxes", "small", "medium", "large", "crowds", "difficult",
        "images: smallest", "median", "largest",
    )  # fmt: skip
    return tabulate([_row(inspection) for inspection in inspections], headers, tablefmt="github")


def _row(inspection: Inspection) -> list:
    records, annotations = inspection.records, inspection.annotations
    sides = boxes_xyxy(annotations)
    areas = (sides[:, 2:] - sides[:, :2]).prod(axis=1)
    sizes = np.digitize(areas, AREA_BOUNDS)
    pixels = sorted((record["width"] * record["height"], record["width"], record["height"]) for record in records)
    places = (0, len(pixels) // 2, -1) if pixels else ()
    return [
        inspection.name,
        len(records),
        sum(not record["annotations"] for record in records),
        len(annotations),
        *((sizes == size).sum() for size in range(3)),
        sum(is_crowd(row) for record in records for row in record["annotations"]),
        sum(row.get("difficult", False) for row in annotations),
        *("{1} x {2}".format(*pixels[place]) for place in places),
    ]


def class_table(inspections: Sequence[Inspection]) -> str:
    """Boxes of each class, a row each, in each data set."""
    names = list(dict.fromkeys(name for inspection in inspections for name in inspection.class_names))
    counts = [dict(zip(inspection.class_names, inspection.boxes_of_classes())) for inspection in inspections]
    rows = [[name, *(count.get(name, "") for count in counts)] for name in names]
    return tabulate(rows, ("class", *(inspection.name for inspection in inspections)), tablefmt="github")

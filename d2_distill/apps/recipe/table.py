"""What each size of detector would see of the objects, as a table."""

from __future__ import annotations

from tabulate import tabulate

from .choices import SIZES, anchor_scale, anchors, image_side
from .objects import PERCENTILES, Objects


def scale_table(objects: Objects) -> str:
    """Return a row for each size of tools/make_configs.py: its images, objects in them, and the share that anchors reach."""
    headers = ("size", "images", *(f"object, {p} %" for p in PERCENTILES), "anchors", "reached")
    rows = []
    for name, size in SIZES.items():
        side = image_side(objects, size.longest_side)
        sides = anchors(anchor_scale(objects, side))
        measures = (f"{value:.0f} px" for value in objects.percentiles(side).values())
        reached = f"{100 * objects.reached(side, sides):.1f} %"
        rows.append((name, f"{side} x {round(side * objects.aspect)}", *measures, ", ".join(map(str, sides)), reached))
    return tabulate(rows, headers, tablefmt="github")

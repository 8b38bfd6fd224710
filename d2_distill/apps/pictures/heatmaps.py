"""Maps of a pyramid's cells laid over the image, in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from .boxes import class_color, name_of
from .level_maps import COMMON, OWN_MAXIMUM, OWN_RANGE, LevelMaps
from .panels import blank_figure

COLORS = "viridis"  # of even brightness steps, and the same to colour-blind eyes
# Inches: of a panel, between panels, left of them, and what stands above a panel and below a colour bar.
PANEL_WIDTH, GAP, LEFT, TITLES, BAR, LABELS = 1.8, 0.05, 0.5, 0.45, 0.07, 0.32
MIN_COLUMNS = 4  # wide enough for the image with its boxes
OPACITY = 0.8  # of a cell over the grey image
DIMMED = 0.6  # brightness of the image where nothing is selected
# What stands below the colour bar of a column.
SCALES = {
    OWN_RANGE: ("least", "largest", "of each map"),
    OWN_MAXIMUM: ("0", "largest", "of each map"),
}


@dataclass(frozen=True)
class Scene:
    """An image as the detectors see it.

    Attributes:
        image: (H, W, 3) uint8 RGB, resized, without padding.
        boxes: title -> ``gt_boxes`` and ``gt_classes``, or ``pred_boxes`` and ``pred_classes``, in its pixels; the
            first are the ground truth.
        class_names: may be empty.
    """

    image: np.ndarray
    boxes: dict[str, Instances]
    class_names: Sequence[str]


def overlay(image: np.ndarray, values: np.ndarray, stride: int, *, selects: bool) -> np.ndarray:
    """Cells in colour over the image in grey.

    Args:
        image: (H, W, 3) uint8 RGB.
        values: (h, w) in [0, 1]; cell (i, j) covers the ``stride`` x ``stride`` pixels from (i, j) * ``stride`` on.
            What lies outside the image is cropped.
        selects: cells of value 0 show the image, dimmed.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from matplotlib import colormaps

    height, width = image.shape[:2]
    values = values.repeat(stride, axis=0).repeat(stride, axis=1)[:height, :width]
    grey = (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None].repeat(3, axis=-1)
    colored = OPACITY * colormaps[COLORS](values)[..., :3] + (1 - OPACITY) * grey
    if selects:
        colored = np.where(values[..., None] > 0, colored, DIMMED * grey)
    return (255 * colored).round().astype(np.uint8)


def scaled(maps: LevelMaps, size: tuple[int, int], strides: dict[str, int], common: float) -> dict[str, np.ndarray]:
    """The maps in [0, 1] as ``maps.scaling`` says, without the padding of an image of ``size`` (H, W)."""
    result = {}
    for name, values in maps.maps.items():
        rows, columns = (-(-side // strides[name]) for side in size)
        values = values[:rows, :columns].numpy().astype(np.float64)
        low = values.min() if maps.scaling == OWN_RANGE else 0.0
        high = common if maps.scaling == COMMON else values.max()
        result[name] = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    return result


def common_maximum(columns: Sequence[LevelMaps]) -> float:
    """Where the colours of all maps of the scaling "common" end: all but a hundredth of their cells lie below."""
    values = [x.flatten() for column in columns if column.scaling == COMMON for x in column.maps.values()]
    return float(torch.cat(values).quantile(0.99)) if values else 1.0


def draw_levels(scene: Scene, strides: dict[str, int], bands: Sequence[Sequence[LevelMaps]]):
    """A matplotlib figure: the image with its boxes, and below it bands of maps, a row for each level.

    Args:
        strides: feature name -> pixels of a cell, in the order of the rows.
        bands: groups of columns; empty ones are left out.

    Raises:
        UserError: matplotlib is not installed.
    """
    bands = [band for band in bands if band]
    height, width = scene.image.shape[:2]
    panel = PANEL_WIDTH, PANEL_WIDTH * height / width
    columns = max([MIN_COLUMNS, *(len(band) for band in bands)])
    inner = columns * (panel[0] + GAP) - GAP
    large = min(2 * panel[0], (inner + GAP) / len(scene.boxes) - GAP)
    large = large, large * height / width
    band_height = TITLES + len(strides) * (panel[1] + GAP) + BAR + LABELS
    page = _Page(LEFT + inner + GAP, TITLES + large[1] + LABELS + len(bands) * band_height)
    _draw_scene(page, scene, large, inner)
    common = common_maximum([column for band in bands for column in band])
    for number, band in enumerate(bands):
        top = TITLES + large[1] + LABELS + number * band_height + TITLES
        for column, maps in enumerate(band):
            left = LEFT + column * (panel[0] + GAP)
            _draw_column(page, scene, strides, maps, (left, top), panel, common)
    return page.figure


class _Page:
    """A figure in which panels are placed in inches from the left and the top."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = blank_figure(width=width, height=height)
        self._size = width, height

    def panel(self, left: float, top: float, width: float, height: float):
        """An empty panel without axes."""
        across, down = self._size
        panel = self.figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
        panel.set_xticks([])
        panel.set_yticks([])
        for side in panel.spines.values():
            side.set_visible(False)
        return panel


def _draw_scene(page: _Page, scene: Scene, size: tuple[float, float], inner: float) -> None:
    from matplotlib.patches import Patch

    present = set()
    step = (inner + GAP) / len(scene.boxes)
    for number, (title, instances) in enumerate(scene.boxes.items()):
        panel = page.panel(LEFT + number * step, TITLES, *size)
        panel.imshow(scene.image)
        panel.set_title(title, fontsize=11)
        boxes, classes = _boxes_of(instances)
        present.update(classes)
        _outline(panel, boxes, [_rgb(index) for index in classes], 1.6)
    handles = [Patch(color=_rgb(index), label=name_of(index, scene.class_names)) for index in sorted(present)]
    if handles:
        legend = page.panel(LEFT, TITLES + size[1], inner, LABELS)
        legend.legend(handles=handles, loc="center", ncols=min(len(handles), 8), fontsize=9, frameon=False)


def _draw_column(
    page: _Page, scene: Scene, strides: dict[str, int], maps: LevelMaps, corner: tuple[float, float],
    size: tuple[float, float], common: float,
) -> None:
    left, top = corner
    boxes, _ = _boxes_of(next(iter(scene.boxes.values())))
    values = scaled(maps, scene.image.shape[:2], strides, common)
    for row, (name, stride) in enumerate(strides.items()):
        panel = page.panel(left, top + row * (size[1] + GAP), *size)
        _draw_map(panel, scene.image, values.get(name), stride, maps, name)
        _outline(panel, boxes, ["white"] * len(boxes), 0.7)
        if left == LEFT:
            panel.set_ylabel(f"{name}\nstride {stride}", fontsize=9)
        if not row:
            panel.set_title(f"{maps.title}\n", fontsize=10, fontweight="bold")
            panel.text(0.5, 1.04, maps.note, transform=panel.transAxes, ha="center", fontsize=7)
    _draw_bar(page.panel(left, top + len(strides) * (size[1] + GAP), size[0], BAR), maps, common)


def _draw_map(panel, image: np.ndarray, values, stride: int, maps: LevelMaps, name: str) -> None:
    if values is None:
        panel.imshow(np.full_like(image, 245))
        panel.text(0.5, 0.5, "no such level", transform=panel.transAxes, ha="center", va="center", fontsize=8)
        return
    panel.imshow(overlay(image, values, stride, selects=maps.selects))
    remark = (maps.remarks or {}).get(name)
    if remark:
        style = {"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0}
        panel.text(0.02, 0.03, remark, transform=panel.transAxes, color="white", fontsize=7, bbox=style)


def _draw_bar(panel, maps: LevelMaps, common: float) -> None:
    panel.imshow(np.linspace(0, 1, 256)[None], cmap=COLORS, aspect="auto")
    low, high, label = SCALES.get(maps.scaling) or ("0", f"≥ {common:.2g}", "of all maps")
    for x, text, side in ((0, low, "left"), (0.5, label, "center"), (1, high, "right")):
        panel.text(x, -0.5, text, transform=panel.transAxes, ha=side, va="top", fontsize=7)


def _boxes_of(instances: Instances) -> tuple[list[list[float]], list[int]]:
    kind = "pred" if instances.has("pred_boxes") else "gt"
    return getattr(instances, f"{kind}_boxes").tensor.tolist(), getattr(instances, f"{kind}_classes").tolist()


def _outline(panel, boxes: Sequence[Sequence[float]], colors: Sequence[Any], width: float) -> None:
    from matplotlib.patches import Rectangle

    for (x0, y0, x1, y1), color in zip(boxes, colors):
        # imshow has the centre of the first pixel at 0.
        panel.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width))


def _rgb(index: int) -> tuple[float, ...]:
    return tuple(value / 255 for value in class_color(index))

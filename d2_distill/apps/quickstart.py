"""Composes the quick-start data set: real handwritten digits on real photographs, in COCO format.

The digits and the photographs are those that scikit-learn carries, so nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError

NAME = "quickstart"
VERSION = 1  # to be raised when the same arguments give other scenes, so that old data is not taken for new
CLASSES = tuple("0123456789")
MIN_SIZE = 64  # of a scene: the largest digit has to fit
DIGIT_SIZES = (20, 48)  # height of a digit in pixels, smallest and largest
MAX_DIGITS = 4
MAX_COVERED = 0.25  # largest share of a digit's box that another digit's box may cover
TRAIN_SHARE = 0.65  # of the digits, and of the width of each photograph
INK = 0.3  # opacity from which a pixel counts as part of the digit

Box = tuple[int, int, int, int]  # x0, y0, x1, y1; the last column and row are excluded


def prepare(
    root: Path, *, train_images: int = 1800, val_images: int = 300, size: int = 96, seed: int = 0
) -> Path:
    """Write ``<root>/quickstart/{train,val}/*.jpg`` and ``annotations/instances_{train,val}.json``.

    The same arguments give the same bytes. The two splits share neither a digit nor a piece of a photograph.
    The folder appears only when it is whole. One that is there already, from the same arguments, is kept.

    Args:
        size: height and width of a scene in pixels.

    Returns:
        the folder of the data set.

    Raises:
        UserError: the folder holds something else, an argument is out of range, or scikit-learn is missing.
    """
    if min(train_images, val_images) < 1 or size < MIN_SIZE or seed < 0:
        raise UserError(
            "The quick-start data needs at least one image a split, "
            f"a size of {MIN_SIZE} or more and a seed that is not negative."
        )
    target = Path(root) / NAME
    recipe = {
        "version": VERSION,
        "train_images": train_images,
        "val_images": val_images,
        "size": size,
        "seed": seed,
    }
    if target.exists():
        return _keep(target, recipe)
    digits, photographs = _sources()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        partial = Path(scratch) / NAME
        (partial / "annotations").mkdir(parents=True)
        for index, (split, count) in enumerate((("train", train_images), ("val", val_images))):
            rng = np.random.default_rng([seed, index])
            scenes = _Scenes(_digits_of(digits, split), _regions_of(photographs, split), size, rng)
            _write_split(partial, split, [scenes.compose() for _ in range(count)], recipe)
        try:
            os.rename(partial, target)
        except OSError:  # another process was faster
            return _keep(target, recipe)
    return target


def _keep(target: Path, recipe: dict[str, int]) -> Path:
    annotations = target / "annotations" / "instances_val.json"
    try:
        found = json.loads(annotations.read_text())["info"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != recipe:
        what = "other data" if found is None else f"data made with {found}"
        raise UserError(f"{target} holds {what}; remove it, or prepare this one below another folder.")
    logging.getLogger(__name__).info("%s is there already.", target)
    return target


def _sources() -> tuple[list[tuple[np.ndarray, int]], list[np.ndarray]]:
    """The digits as (8x8 opacity in [0, 1], class), and the photographs as (H, W, 3) uint8 RGB."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        raise UserError(
            "The quick-start data is made from scikit-learn's samples; run `pip install scikit-learn`."
        ) from None
    samples = load_digits()
    digits = [(image / 16.0, int(label)) for image, label in zip(samples.images, samples.target)]
    return digits, list(load_sample_images().images)


def _digits_of(digits: list, split: str) -> list:
    border = int(len(digits) * TRAIN_SHARE)
    return digits[:border] if split == "train" else digits[border:]


def _regions_of(photographs: list[np.ndarray], split: str) -> list[np.ndarray]:
    # The left goes to validation: in both photographs it holds plain and textured parts.
    borders = [round(photograph.shape[1] * (1 - TRAIN_SHARE)) for photograph in photographs]
    return [p[:, border:] if split == "train" else p[:, :border] for p, border in zip(photographs, borders)]


class _Scenes:
    """A stream of scenes, each an (S, S, 3) uint8 RGB image with the boxes and classes of its digits."""

    def __init__(self, digits: list, regions: list[np.ndarray], size: int, rng: np.random.Generator):
        self.digits, self.regions, self.size, self.rng = digits, regions, size, rng

    def compose(self) -> tuple[np.ndarray, list[tuple[Box, int]]]:
        scene, objects = self._background(), []
        for _ in range(self.rng.integers(1, MAX_DIGITS + 1)):
            opacity, label = self._digit()
            box = self._free_place(opacity.shape, [box for box, _ in objects])
            if box is not None:
                _paint(scene, opacity, box, self._colour(scene, box))
                objects.append((box, label))
        return np.clip(scene, 0, 255).round().astype(np.uint8), objects

    def _background(self) -> np.ndarray:
        """A random square of a photograph, scaled to the scene, mirrored and lit at random."""
        region = self.regions[self.rng.integers(len(self.regions))]
        height, width = region.shape[:2]
        longest = min(2 * self.size, width, height)
        side = int(self.rng.integers(min(2 * self.size // 3, longest), longest + 1))
        y, x = self.rng.integers(height - side + 1), self.rng.integers(width - side + 1)
        crop = region[y : y + side, x : x + side]
        if self.rng.random() < 0.5:
            crop = crop[:, ::-1]
        scaled = Image.fromarray(np.ascontiguousarray(crop)).resize((self.size, self.size), Image.BILINEAR)
        return np.asarray(scaled, dtype=np.float32) * self.rng.uniform(0.6, 1.2)

    def _digit(self) -> tuple[np.ndarray, int]:
        """A random digit at a random size and aspect, as its opacity cut to the ink, and its class."""
        image, label = self.digits[self.rng.integers(len(self.digits))]
        height = float(np.exp(self.rng.uniform(*np.log(DIGIT_SIZES))))
        shape = (round(height * self.rng.uniform(0.8, 1.2)), round(height))  # width, height
        scaled = Image.fromarray(image.astype(np.float32)).resize(shape, Image.BICUBIC)
        opacity = np.clip(np.asarray(scaled), 0, 1)
        rows, columns = (np.flatnonzero((opacity >= INK).any(axis=axis)) for axis in (1, 0))
        return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], label

    def _free_place(self, shape: tuple[int, int], taken: list[Box], attempts: int = 20):
        height, width = shape
        for _ in range(attempts):
            x, y = (int(self.rng.integers(self.size - extent + 1)) for extent in (width, height))
            box = (x, y, x + width, y + height)
            if all(_covered(box, other) <= MAX_COVERED for other in taken):
                return box
        return None

    def _colour(self, scene: np.ndarray, box: Box) -> np.ndarray:
        """A colour darker or brighter than what it will cover, by a contrast that varies."""
        x0, y0, x1, y1 = box
        below = scene[y0:y1, x0:x1].mean(axis=(0, 1))
        contrast = self.rng.uniform(90, 180) * self.rng.choice([-1, 1])
        if not 0 <= below.mean() + contrast <= 255:
            contrast = -contrast
        return np.clip(below + contrast + self.rng.uniform(-25, 25, size=3), 0, 255)


def _covered(a: Box, b: Box) -> float:
    """Share of the smaller box that the other one covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _paint(scene: np.ndarray, opacity: np.ndarray, box: Box, colour: np.ndarray) -> None:
    x0, y0, x1, y1 = box
    alpha = opacity[..., None]
    scene[y0:y1, x0:x1] = (1 - alpha) * scene[y0:y1, x0:x1] + alpha * colour


def _write_split(folder: Path, split: str, scenes: list, recipe: dict[str, int]) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (scene, objects) in enumerate(scenes, start=1):
        file_name = f"{image_id:06d}.jpg"
        Image.fromarray(scene).save(folder / split / file_name, quality=92)
        height, width = scene.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for (x0, y0, x1, y1), label in objects:
            width, height = x1 - x0, y1 - y0
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1,
                "bbox": [x0, y0, width, height], "area": width * height, "iscrowd": 0,
            })
    content = {
        "info": {"description": f"Handwritten digits on photographs, {split} split", "recipe": recipe},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(CLASSES, start=1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))

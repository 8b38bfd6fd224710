"""Where golden cases live, and the deterministic numbers that the detectron2 suite is generated from."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .recording import RecordedArrays, leaves, record

COMMITTED = Path(__file__).parent / "data"


# Keys at the top of a case's JSON that are no parameters.
NOT_PARAMETERS = {
    "case": "the case's own name",
    "name": "the case's own name",
    "reference": "whose code was run",
    "seed": "of the inputs, which are stored",
    "informative": "the reference's number is a quirk; it is compared all the same",
    "arrays": "shapes and types of the arrays, which carry them",
    "inputs": "the same of the inputs alone",
    "outputs": "the same of the outputs alone",
}
# Keys at the top that are no parameters where they hold text.
REMARKS = ("description", "meaning", "note", "notes", "what")


class Case:
    """One recorded case, which notes what is read of it.

    Attributes:
        name: path below the suite's folder, without suffix.
        data: the JSON.
        arrays: the arrays of the npz by name.
        scratch: an empty folder for files that a check writes.
    """

    def __init__(
        self, name: str, data: dict[str, Any], arrays: Mapping[str, np.ndarray], scratch: Path | None = None
    ) -> None:
        self.name, self.scratch = name, scratch
        self._json, self._read_data, self._read_arrays = data, set(), set()
        self.data = record(data, self._read_data)
        self.arrays = RecordedArrays(arrays, self._read_arrays)

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def skip(self, *path: str | int) -> None:
        """Count everything below a path of the JSON as read; call it only with a reason beside the call."""
        value = self._json
        for key in path:
            value = value[key]
        self._read_data.update(leaves(value, path))

    def unread(self) -> list[str]:
        """Parameters and arrays that nothing has read so far."""
        paths = [path for path in leaves(self._json) if path not in self._read_data and not self._is_remark(path)]
        arrays = [key for key in self.arrays if (key,) not in self._read_arrays]
        return [".".join(map(str, path)) for path in paths] + [f"array {key}" for key in arrays]

    def _is_remark(self, path: tuple[str | int, ...]) -> bool:
        top = path[0] if path else None
        return top in NOT_PARAMETERS or (top in REMARKS and isinstance(self._json[top], str))


def suite_root(suite: str) -> Path:
    """Folder of a suite below ``$D2_DISTILL_GOLDEN``, or below the committed selection."""
    return Path(os.environ.get("D2_DISTILL_GOLDEN") or COMMITTED) / suite


def case_names(suite: str) -> list[str]:
    """Every recorded case of a suite, as its path without suffix (sub-folders included)."""
    root = suite_root(suite)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.json"))


def load(suite: str, name: str, scratch: Path | None = None) -> Case:
    """Load the case of a suite."""
    path = suite_root(suite) / f"{name}.json"
    arrays: dict[str, np.ndarray] = {}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz")) as npz:
            arrays = {key: npz[key] for key in npz.files}
    return Case(name, json.loads(path.read_text()), arrays, scratch)


def hash_u(name: str, n: int, salt: int = 0) -> np.ndarray:
    """n numbers in [0, 1) that depend on the name only (formula: README of the detectron2 suite)."""
    start = np.uint32((zlib.crc32(name.encode()) + salt) % 2**32)
    with np.errstate(over="ignore"):
        x = start + np.arange(n, dtype=np.uint32) * np.uint32(2654435761)
        x ^= x >> np.uint32(16)
        x *= np.uint32(2246822519)
        x ^= x >> np.uint32(13)
        x *= np.uint32(3266489917)
        x ^= x >> np.uint32(16)
    return x.astype(np.float64) / 2**32


_HALVED = ("cls_score", "bbox_pred", "ctrness", "objectness_logits", "anchor_deltas")
_NEGATIVE_BIAS = ("cls_score.bias", "objectness_logits.bias", "ctrness.bias")


def parameter_value(name: str, shape, salt: int = 0) -> torch.Tensor:
    """The value that the recordings give to the state-dict entry ``name``."""
    shape = tuple(shape)
    last = name.split(".")[-1]
    u = hash_u(name, int(np.prod(shape, dtype=int)), salt).reshape(shape)
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.long)
    if last == "running_mean":
        value = 0.2 * (u - 0.5)
    elif last == "running_var":
        value = 0.5 + u
    elif len(shape) >= 2:
        value = np.sqrt(6 / np.prod(shape[1:])) * (2 * u - 1)
        if name.endswith(tuple(f"{layer}.weight" for layer in _HALVED)):
            value = value * 0.5
        if name.endswith("stem.conv1.weight"):
            value = value / 64
    elif len(shape) == 1 and last == "weight":
        value = 0.25 + 0.5 * u
    elif name.endswith(_NEGATIVE_BIAS):
        value = -1 + 0.4 * (u - 0.5)
    else:
        value = 0.2 * (u - 0.5)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def fill_parameters(model: nn.Module, salt: int = 0) -> None:
    """Give every entry of the model's state dict its recorded value."""
    state = model.state_dict()
    model.load_state_dict({name: parameter_value(name, value.shape, salt) for name, value in state.items()})


def golden_image(tag: str, height: int, width: int) -> torch.Tensor:
    """(3, H, W) float32 image of whole numbers 0..255."""
    values = np.floor(256 * hash_u(f"image:{tag}", 3 * height * width))
    return torch.from_numpy(values.astype(np.float32)).reshape(3, height, width)


def golden_gt(tag: str, n: int, height: int, width: int, num_classes: int):
    """Boxes (n, 4) XYXY float32 and classes (n,) int64 of the image called ``tag``."""
    u = hash_u(f"gt:{tag}", 5 * n).reshape(n, 5)
    w, h = (0.15 + 0.6 * u[:, 2]) * width, (0.15 + 0.6 * u[:, 3]) * height
    x, y = u[:, 0] * (width - w), u[:, 1] * (height - h)
    boxes = np.round(np.stack([x, y, x + w, y + h], axis=1) * 4) / 4
    return (torch.from_numpy(boxes.astype(np.float32)),
            torch.from_numpy(np.floor(u[:, 4] * num_classes).astype(np.int64)))

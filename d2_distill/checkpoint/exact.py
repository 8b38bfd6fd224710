"""Checkpoints that must fit their model, and checkpoints that hold nothing but the student."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError
from ..whole_files import whole_file
from .harmless import as_trusted, require_harmless
from .names import looks_like_openmmlab, prefix_that_differs, some
from .resuming import POINTER, find_resumable
from .slimmable import fit_to_model, require_filled
from .torchvision import fit_classifier, is_address


class DataCheckpointer(DetectionCheckpointer):
    """Detectron2's, which runs nothing that a file contains, takes no file with numbers that are none, and remembers
    which names did not fit.

    Loading raises UserError for other files.
    """

    def _load_file(self, filename: str) -> Any:
        if filename.endswith(".safetensors"):  # a format that can hold nothing but tensors
            checkpoint = _read_safetensors(filename)
        else:
            require_harmless(filename)
            with as_trusted():
                checkpoint = super()._load_file(filename)
        self.names = list(checkpoint["model"])
        require_finite(checkpoint["model"], filename)
        return checkpoint

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def require_finite(state: Mapping[str, Any], source: str) -> None:
    """
    Args:
        state: name -> tensor or array; other values are passed over.

    Raises:
        UserError: one of them holds NaN or infinite numbers.
    """
    tensors = {name: torch.as_tensor(value) for name, value in state.items() if isinstance(value, (torch.Tensor, np.ndarray))}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinite numbers in {len(broken)} of {len(tensors)} tensors ({some(broken)}), so its "
            "training diverged or the file is damaged; name another checkpoint."
        )


class WholeCheckpointer(DataCheckpointer):
    """Writes checkpoints that appear complete or not at all, and continues from the newest that is whole."""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with whole_file(Path(self.save_dir) / POINTER) as partial:
            partial.write_text(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(find_resumable(self.save_dir))

    def get_checkpoint_file(self) -> str:
        return find_resumable(self.save_dir)


class TrainingCheckpointer(WholeCheckpointer):
    """Detectron2's, which also takes published weights of slimmable networks and of classifiers in torchvision's or
    timm's names, under any file name, and as ``.safetensors``.

    Loading raises UserError where such weights do not fill the backbone completely, or where nothing fits the model.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        rest = super().load(path, *args, **kwargs)
        if path:
            require_filled(self.model, self.incompatible.missing_keys, path)
            self._require_any(path)
        return rest

    def _require_any(self, path: str) -> None:
        # Of the buffers Detectron2 calls some neither missing nor unexpected.
        names = [name for name, _ in self.model.named_parameters()]
        unfilled = {*self.incompatible.missing_keys, *(name for name, _, _ in self.incompatible.incorrect_shapes)}
        if names and unfilled >= set(names):
            raise UserError(
                f"{path} has nothing for this model: none of its {len(self.names)} tensors ({some(self.names)}) fits one of "
                f"the model's {len(names)} ({some(names)}).{_hint(names, self.names)} Name other weights, or \"\" to start "
                "from random ones."
            )

    def _load_file(self, filename: str) -> Any:
        checkpoint = super()._load_file(filename)
        state = fit_to_model(checkpoint["model"], self.model, filename)
        if "__author__" not in checkpoint:  # others are matched with the backbone's names by Detectron2
            state = fit_classifier(state, self.model, filename)
        checkpoint["model"] = state
        return checkpoint


def _read_safetensors(filename: str) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"MODEL.WEIGHTS: {filename} needs safetensors ({error}); install it: pip install safetensors."
        ) from error
    return {"model": load_file(filename)}


def require_file(weights: str, *, key: str) -> None:
    """
    Raises:
        UserError: ``weights`` is neither an address nor an existing file, or a folder; see :func:`load_exactly`.
    """
    path = weights.split("?")[0]
    if os.path.isdir(path):
        raise UserError(
            f"{key}: {weights} is a folder; name the checkpoint in it, such as {os.path.join(path, 'model_final.pth')}."
        )
    if "://" not in weights and not os.path.isfile(path):
        raise UserError(f"{key}: there is no file {weights}; train the model first or correct the path.")


@contextlib.contextmanager
def readable(weights: str, *, key: str) -> Iterator[None]:
    """
    Raises:
        UserError: reading ``weights`` inside failed; see :func:`load_exactly`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever unpickling, the network or the conversion of names raises
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")  # torch goes on at length
        remedy = "download it elsewhere and name the file" if isinstance(error, URLError) else "replace it"
        raise UserError(f"{key}: {weights} cannot be read as a checkpoint ({reason}); {remedy}.") from error


def load_exactly(model: nn.Module, weights: str, *, key: str) -> None:
    """Load a checkpoint that must fill the model completely and contain nothing else.

    Args:
        model: the plain detector.
        weights: path or address, as for ``MODEL.WEIGHTS``.
        key: the config key that names it.

    Raises:
        UserError: the file is missing or unreadable, or keys are missing, unexpected or of another shape.
    """
    if not weights:
        raise UserError(f"{key} is empty; name the checkpoint of the model.")
    if is_address(weights):
        raise UserError(
            f"{key}: {weights} names the weights of a classifier, which only training can start from; name the "
            "checkpoint of a trained detector."
        )
    require_file(weights, key=key)
    checkpointer = DataCheckpointer(model)
    with readable(weights, key=key):
        checkpointer.load(weights, checkpointables=[])
    found = checkpointer.incompatible
    # A mis-shaped tensor is not loaded, so that it counts as missing, too.
    misshaped = {name for name, _, _ in found.incorrect_shapes}
    problems = {
        "missing": [name for name in found.missing_keys if name not in misshaped],
        "unexpected": list(found.unexpected_keys),
        "mis-shaped": [
            f"{name} {tuple(theirs)} (model: {tuple(ours)})" for name, theirs, ours in found.incorrect_shapes
        ],
    }
    listing = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    if listing:
        raise UserError(
            f"{key}: {weights} does not fit the model of its config; name the checkpoint that does "
            f"({'; '.join(listing)}).{_hint(list(model.state_dict()), checkpointer.names)}"
        )


def _hint(ours: Collection[str], theirs: Collection[str]) -> str:
    """Return a sentence about what would make a file's names fit a model's, or ""."""
    if looks_like_openmmlab(theirs) and not looks_like_openmmlab(ours):
        return " It is OpenMMLab's: convert it with tools/convert_openmmlab.py."
    return prefix_that_differs(ours, theirs)

"""Checkpoints that must fit their model, and checkpoints that hold nothing but the student."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError
from .slimmable import fit_to_model, require_filled
from .torchvision import fit_classifier, is_address


class _ExactCheckpointer(DetectionCheckpointer):
    """Remembers which keys did not fit."""

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


class TrainingCheckpointer(_ExactCheckpointer):
    """Detectron2's, which also takes published weights of slimmable networks and of classifiers in torchvision's or
    timm's names, under any file name, and as ``.safetensors``.

    Loading raises UserError where such weights do not fill the backbone completely.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        rest = super().load(path, *args, **kwargs)
        if path:
            require_filled(self.model, self.incompatible.missing_keys, path)
        return rest

    def _load_file(self, filename: str) -> Any:
        read = _read_safetensors if filename.endswith(".safetensors") else super()._load_file
        checkpoint = read(filename)
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
    checkpointer = _ExactCheckpointer(model)
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
    listing = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if listing:
        raise UserError(
            f"{key}: {weights} does not fit the model of its config; name the checkpoint that does "
            f"({'; '.join(listing)})."
        )

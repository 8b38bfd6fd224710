"""``DetectionCheckpointer``: it also reads Detectron, Caffe2, pycls and bare weight files."""

from __future__ import annotations

import logging
import os
import pickle
from typing import Any
from urllib.parse import parse_qs

import detectron2.utils.comm as comm
import torch
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer

from .c2_model_loading import align_and_update_state_dicts


class DetectionCheckpointer(Checkpointer):
    """fvcore's checkpointer with the file forms of the model zoo, and with names matched by their ends.

    The path may carry ``?matching_heuristics=True``, which matches names as
    :func:`~detectron2.checkpoint.c2_model_loading.align_and_update_state_dicts` does; some forms imply it.

    Args:
        save_to_disk: by default only the main process writes.
    """

    def __init__(self, model, save_dir: str = "", *, save_to_disk: bool | None = None, **checkpointables):
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file, which every process must be able to read; an empty path loads nothing.

        Returns:
            What no checkpointable took.

        Raises:
            AssertionError: the file does not exist.
            ValueError: the path has a query other than matching_heuristics.
            pickle.UnpicklingError: a .pth file holds more than tensors and plain python values.
        """
        path, _, query = path.partition("?")
        self._matching_heuristics = _parse_query(query)
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            checkpoint = _load_pickle(filename)
        elif filename.endswith(".pyth"):
            checkpoint = {"model": _load_tensors(filename)["model_state"],
                          "__author__": "pycls", "matching_heuristics": True}
        else:
            checkpoint = _load_tensors(filename)
            if "model" not in checkpoint:
                checkpoint = {"model": checkpoint}
        if self._matching_heuristics:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"],
                c2_conversion=checkpoint.get("__author__") == "Caffe2")
        incompatible = super()._load_model(checkpoint)
        # Older files hold the cell anchors, and lack the image statistics: both come from the config.
        return incompatible._replace(
            missing_keys=[key for key in incompatible.missing_keys if key not in ("pixel_mean", "pixel_std")],
            unexpected_keys=[key for key in incompatible.unexpected_keys
                             if "anchor_generator.cell_anchors" not in key],
        )


def _parse_query(query: str) -> bool:
    """Whether the path's query turns matching on; it knows no other option."""
    options = parse_qs(query, keep_blank_values=True)
    matching_heuristics = options.pop("matching_heuristics", ["False"]) == ["True"]
    if options:
        raise ValueError(f"A checkpoint's path may end with ?matching_heuristics=True, not with ?{query}.")
    return matching_heuristics


def _load_pickle(filename: str) -> dict[str, Any]:
    with open(filename, "rb") as f:
        data = pickle.load(f, encoding="latin1")  # written by Python 2
    if "model" in data and "__author__" in data:
        logging.getLogger(__name__).info(f"{filename} was made by {data['__author__']}")
        return data
    blobs = data.get("blobs", data)
    model = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def _load_tensors(filename: str) -> dict[str, Any]:
    # Explicit because torch before 2.6 would run whatever code the file asks for. Later ones know the variable.
    is_trusted = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true")
    try:
        return torch.load(filename, map_location="cpu", weights_only=not is_trusted)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{filename} is damaged, or holds objects other than tensors and plain python values; save its "
            "weights again as {'model': state_dict} with torch.save.") from error

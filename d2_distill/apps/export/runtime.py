"""Exported files, run: as functions of tensors, and as detectors that Detectron2 evaluates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers the operators of TorchScript files
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from ...errors import UserError
from .description import FORMAT
from .tracing import quiet, reason_of
from .writers import METADATA_FILE

SUFFIXES = {".pt": "torchscript", ".onnx": "onnx"}


class Exported:
    """A file as a function of images (N, 3, H, W) uint8, in the order of ``description["outputs"]``."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError


class ExportedTorchScript(Exported):
    """Run by torch on the CPU, for which it was traced."""

    def __init__(self, path: Path) -> None:
        extra = {METADATA_FILE: ""}
        with quiet():
            self._graph = torch.jit.load(str(path), _extra_files=extra)
        super().__init__(json.loads(extra[METADATA_FILE] or "{}"))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._graph(images)


class ExportedONNX(Exported):
    """Run by onnxruntime on the CPU, in as many threads as torch."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        props = self._session.get_modelmeta().custom_metadata_map
        super().__init__({key: json.loads(value) for key, value in props.items()} if "format" in props else {})

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._session.run(None, {"image": images.numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)


def load_exported(path: Path) -> Exported:
    """
    Raises:
        UserError: the file is missing or was not written by this project, or onnxruntime is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: exported files end with {' or '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        exported = ExportedTorchScript(path) if path.suffix == ".pt" else ExportedONNX(path)
    except ImportError:
        raise UserError("ONNX files are run by onnxruntime; run `pip install onnxruntime`.") from None
    except Exception as error:  # whatever the two runtimes raise
        raise UserError(f"{path} cannot be loaded ({reason_of(error)}); export it again.") from error
    if exported.description.get("format") != FORMAT:
        raise UserError(f"{path} does not describe itself as {FORMAT!r}; export it by tools/export.py.")
    return exported


class ExportedDetector(nn.Module):
    """An exported file with Detectron2's contract of a detector in eval mode.

    Args:
        exported: with post-processing.
    """

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, x: dict[str, Any]) -> Instances:
        height, width = x["image"].shape[-2:]
        boxes, scores, classes = self.exported(padded(x["image"][None], self.exported.description))
        found = Instances((height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        return detector_postprocess(found, x.get("height", height), x.get("width", width))


def padded(images: torch.Tensor, description: dict[str, Any]) -> torch.Tensor:
    """Images (N, 3, H, W), below and on the right of which the mean colour fills the fixed size, if there is one.

    Raises:
        UserError: they are larger.
    """
    if description["fixed_size"] is None:
        return images
    missing = [fixed - side for fixed, side in zip(description["fixed_size"], images.shape[-2:])]
    if min(missing) < 0:
        height, width = images.shape[-2:]
        raise UserError(
            "An image of {} x {} does not fit into --fixed-size {} {}; take a larger one, or resize less "
            "(INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST).".format(height, width, *description["fixed_size"])
        )
    canvas = F.pad(images, (0, missing[1], 0, missing[0]))
    for channel, value in enumerate(description["pad_value"]):
        canvas[:, channel, images.shape[-2] :] = canvas[:, channel, :, images.shape[-1] :] = value
    return canvas

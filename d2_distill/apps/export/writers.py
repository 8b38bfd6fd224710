"""Graphs as TorchScript and ONNX files.

Both are traced by TorchScript's tracer, which every supported torch has and which follows sizes and numbers of
detections that differ from image to image.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from .tracing import quiet, reason_of, traced_sizes

METADATA_FILE = "metadata.json"
# Records of a TorchScript file that running does not need: paths of the sources on this machine, the example image, and
# a number that is another one each time.
LEFT_OUT = (".debug_pkl", "/traced_inputs", "/.data/serialization_id")
# The first in which RoIAlign is Detectron2's is 16; torch 2.3 writes up to 17.
OPSET = 17


def write_torchscript(graph: nn.Module, example: torch.Tensor, description: dict[str, Any], path: Path) -> None:
    """
    Args:
        graph: one of :mod:`.graphs`, on the CPU.
        example: images to trace with; others may have other sizes.
        description: goes into the file as ``metadata.json``.

    Raises:
        UserError: the detector cannot be traced.
    """
    with torch.no_grad(), quiet(), traced_sizes():
        # The trace is checked on other images later, against the detector itself.
        with _explained(graph, "TorchScript"):
            traced = torch.jit.trace(graph, example, check_trace=False, strict=False)
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(traced, buffer, _extra_files={METADATA_FILE: json.dumps(description)})
    with zipfile.ZipFile(buffer) as complete, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as stripped:
        for entry in complete.infolist():
            if not any(part in entry.filename for part in LEFT_OUT):
                stripped.writestr(entry, complete.read(entry))


def write_onnx(
    graph: nn.Module,
    example: torch.Tensor,
    description: dict[str, Any],
    path: Path,
    *,
    fixed_size: tuple[int, int] | None = None,
) -> None:
    """
    Args:
        graph, example: as for :func:`write_torchscript`.
        description: goes into the model's ``metadata_props``, each value as JSON.
        fixed_size: (H, W) that every image must have; None leaves it free.

    Raises:
        UserError: onnx is not installed, or this torch cannot write the graph.
    """
    onnx = require_onnx()
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # torch 2.5 on
        options["dynamo"] = False
    buffer = io.BytesIO()
    with torch.no_grad(), quiet(), traced_sizes():
        with _explained(graph, "ONNX"):
            torch.onnx.export(
                graph,
                (example,),
                buffer,
                input_names=["image"],
                output_names=list(graph.output_names),
                dynamic_axes=_free_axes(graph.output_names, description["post_processing"], fixed_size),
                opset_version=OPSET,
                **options,
            )
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in description.items()})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _explained(graph: nn.Module, what: str) -> Iterator[None]:
    """
    Raises:
        UserError: the code inside fails.
    """
    try:
        yield
    except Exception as error:  # whatever the tracer, or the code it traces, raises
        reason = reason_of(error)
        remedy = "export --raw, or the checkpoint"
        if "deform_conv2d" in reason:
            reason, remedy = "it has no operator for deformable convolutions", "export torchscript, or the checkpoint"
        raise UserError(
            f"torch {torch.__version__} cannot write {type(graph.model).__name__} as {what} ({reason}); {remedy}."
        ) from error


def _free_axes(
    output_names: tuple[str, ...], post_processing: bool, fixed_size: tuple[int, int] | None
) -> dict[str, dict[int, str]]:
    image = {} if fixed_size else {2: "height", 3: "width"}
    if post_processing:
        return {"image": image, **{name: {0: "detections"} for name in output_names}}
    rows = {0: "images"} if fixed_size else {0: "images", 1: "anchors"}
    return {"image": {0: "images", **image}, **{name: rows for name in output_names}}


def require_onnx() -> Any:
    """The package onnx.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX files need onnx and onnxruntime; run `pip install onnx onnxruntime`.") from None
    return onnx

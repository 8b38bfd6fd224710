"""Tracing with sizes that stay free: ``torch.jit.trace`` of modules that were written for eager mode."""

from __future__ import annotations

import builtins
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ...config import user_code

# Packages whose modules take part in a detector.
PACKAGES = ("detectron2", "d2_distill", user_code.PACKAGE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings that TorchScript is old, and that checks of shapes are not in the trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def traced_sizes() -> Iterator[None]:
    """While tracing, ``len`` and ``min`` in Detectron2's and this project's modules keep sizes as tensors.

    The builtin ones make numbers of them, which the graph would then have for every image.
    """
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES]
    for module in modules:
        module.len, module.min = _len, _min
    try:
        yield
    finally:
        for module in modules:
            del module.len, module.min


def reason_of(error: Exception) -> str:
    """What an error of torch or onnxruntime says, without the graph that torch adds to it."""
    lines = [line.strip() for line in str(error).partition("Torch IR graph")[0].splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _len(value: Any) -> Any:
    return value.__len__()


def _min(*values: Any, **options: Any) -> Any:
    if any(isinstance(value, torch.Tensor) for value in values) and len(values) == 2:
        return torch.minimum(*(torch.as_tensor(value) for value in values))
    return builtins.min(*values, **options)

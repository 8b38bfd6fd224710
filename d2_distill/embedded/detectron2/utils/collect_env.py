"""``collect_env_info``: what runs here, for logs and bug reports."""

from __future__ import annotations

import importlib
import os
import platform
import sys

import detectron2
import torch
from tabulate import tabulate

_MODULES = ("numpy", "torch", "torchvision", "fvcore", "iopath", "PIL", "cv2", "pycocotools")


def collect_env_info() -> str:
    """A two-column text table."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return tabulate([
        ("system", platform.platform()),
        ("Python", sys.version.replace("\n", "")),
        ("detectron2", f"{detectron2.__version__}, embedded in {os.path.dirname(detectron2.__file__)}"),
        *((module, _version(module)) for module in _MODULES),
        ("CUDA", torch.version.cuda),
        ("GPUs", ", ".join(gpus) or "none"),
    ])


def _version(module: str) -> str:
    try:
        return getattr(importlib.import_module(module), "__version__", "unknown version")
    except ImportError:
        return "not installed"

"""Writes converted checkpoints, which must fill their models exactly."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Dict

import torch
from torch import nn

from .checkpoint import load_exactly
from .errors import UserError


def require_new_file(path: Path) -> None:
    """
    Raises:
        UserError: Detectron2 would not know the file's format, or the file exists.
    """
    if path.suffix != ".pth":
        raise UserError(f"{path} must end with .pth, by which Detectron2 knows the format.")
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another name.")


def save_converted(
    state_dict: Dict[str, torch.Tensor], model: nn.Module, path: Path, *, source: str, key: str
) -> None:
    """Write ``path``, and what was written to stderr.

    Args:
        model: to be filled; it is.
        source: the file that was converted.
        key: what the error message calls it.

    Raises:
        UserError: the tensors do not fill the model exactly; then there is no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state_dict}, path)
    try:
        load_exactly(model, str(path), key=key)
    except BaseException:
        path.unlink()
        raise
    values = sum(value.numel() for value in state_dict.values())
    for verb, name in (("Read ", source), ("Wrote", path)):
        print(f"{verb} {name}: {os.path.getsize(name) / 1e6:.2f} MB", file=sys.stderr)
    print(f"{len(state_dict)} tensors, {values / 1e6:.2f} M values", file=sys.stderr)

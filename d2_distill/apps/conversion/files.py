"""Writes converted checkpoints, which must fill their models exactly."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.exact import load_exactly
from ...detectors.building import build_detector
from ...errors import UserError
from ...whole_files import whole_file
from .result import Conversion


def require_new_file(path: Path, suffix: str = ".pth") -> None:
    """
    Args:
        suffix: of the format.

    Raises:
        UserError: Detectron2 would not know the file's format, or the file exists.
    """
    if path.suffix != suffix:
        raise UserError(f"{path} must end with {suffix}, by which Detectron2 knows the format.")
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another name.")


def require_pairs(opts: Sequence[str]) -> None:
    """
    Raises:
        UserError: a key of the command line has no value.
    """
    if len(opts) % 2:
        raise UserError(f"KEY VALUE: {' '.join(opts)} is an odd number of words; give each key a value.")


def save_detector(conversion: Conversion, path: Path, *, source: str) -> None:
    """Write ``path`` for the detector of the config, which is built on the CPU, and what was written to stderr.

    Args:
        source: the file that was converted.

    Raises:
        UserError: this Detectron2 cannot build the detector, or the tensors do not fill it exactly.
    """
    cfg = conversion.cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_detector(cfg)
    except NotImplementedError as error:  # the embedded Detectron2's, for what it leaves out
        raise UserError(f"{source} cannot be converted here: {error}") from error
    # Frozen batch norms do not count their batches; nothing reads these counters.
    ours = model.state_dict()
    state = {
        name: value
        for name, value in conversion.state_dict.items()
        if name in ours or not name.endswith(".num_batches_tracked")
    }
    save_converted(state, model, path, source=source, key=f"{source} as {cfg.MODEL.META_ARCHITECTURE}")


def save_converted(
    state_dict: dict[str, torch.Tensor], model: nn.Module, path: Path, *, source: str, key: str
) -> None:
    """Write ``path``, and what was written to stderr.

    Args:
        model: to be filled; it is.
        source: the file that was converted.
        key: what the error message calls it.

    Raises:
        UserError: the tensors do not fill the model exactly; then there is no file.
    """
    try:
        with whole_file(path) as partial:
            torch.save({"model": state_dict}, partial)
        load_exactly(model, str(path), key=key)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    values = sum(value.numel() for value in state_dict.values())
    for verb, name in (("Read ", source), ("Wrote", path)):
        print(f"{verb} {name}: {os.path.getsize(name) / 1e6:.2f} MB", file=sys.stderr)
    print(f"{len(state_dict)} tensors, {values / 1e6:.2f} M values", file=sys.stderr)

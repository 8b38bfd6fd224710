"""The student's weights alone, out of a checkpoint of training."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.exact import readable, require_file, require_finite
from ...checkpoint.harmless import require_harmless
from ...errors import UserError
from ...whole_files import whole_file


def read_checkpoint(path: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the file is missing, cannot be read, or holds no model's weights under "model".
    """
    require_file(path, key="The checkpoint")
    with readable(path, key="The checkpoint"):
        require_harmless(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not (isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())):
        raise UserError(f"The checkpoint: {path} has no weights under 'model'; name one of train_net.py.")
    require_finite(state, path)
    return checkpoint


def to_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors in half precision; counters stay as they are.

    Raises:
        UserError: a finite value is beyond half precision's range.
    """
    halved = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    for name, value in state.items():
        if not torch.equal(halved[name].isfinite(), value.isfinite()):
            raise UserError(
                f"--half: {name} has values up to {value.abs().max().item():.3g}, beyond half precision's "
                f"{torch.finfo(torch.half).max:.0f}; export without --half."
            )
    return halved


def write_checkpoint(state: dict[str, torch.Tensor], output: Path) -> Path:
    """Write ``{"model": state}`` with the first 8 digits of its sha256 in the name.

    Returns:
        The path.
    """
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    content = buffer.getvalue()
    target = output.with_name(f"{output.stem}-{hashlib.sha256(content).hexdigest()[:8]}{output.suffix}")
    with whole_file(target) as path:
        path.write_bytes(content)
    return target

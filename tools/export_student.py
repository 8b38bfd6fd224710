#!/usr/bin/env python3
"""Strip a checkpoint of train_net.py to the student's weights, to be published or deployed.

    python tools/export_student.py output/quickstart/distilled/model_final.pth student.pth --half

writes student-<first 8 digits of the file's sha256>.pth, which loads as MODEL.WEIGHTS of the plain student.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any, Dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  chooses the Detectron2 that d2_distill.checkpoint finds
import torch
from d2_distill.checkpoint import readable, require_file
from d2_distill.errors import UserError


def read_checkpoint(path: str) -> Dict[str, Any]:
    """
    Raises:
        UserError: the file is missing, cannot be read, or holds no model's weights under "model".
    """
    require_file(path, key="The checkpoint")
    with readable(path, key="The checkpoint"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not (isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())):
        raise UserError(f"The checkpoint: {path} has no weights under 'model'; name one of train_net.py.")
    return checkpoint


def to_half(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
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


def write(state: Dict[str, torch.Tensor], output: Path) -> Path:
    """Write ``{"model": state}`` with its hash in the name; the file appears complete or not at all."""
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    content = buffer.getvalue()
    target = output.with_name(f"{output.stem}-{hashlib.sha256(content).hexdigest()[:8]}{output.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def export(checkpoint: str, output: Path, *, half: bool) -> None:
    if output.suffix != ".pth":
        raise UserError(f"{output} must end with .pth, by which Detectron2 knows the format.")
    content = read_checkpoint(checkpoint)
    state = content.pop("model")
    target = write(to_half(state) if half else state, output)
    print(f"Read  {checkpoint}: {_megabytes(checkpoint)}")
    print(f"Wrote {target}: {_megabytes(target)}{', half precision' if half else ''}")
    print(f"Left out: {', '.join(sorted(content)) or 'nothing'}")


def _megabytes(path) -> str:
    return f"{os.path.getsize(path) / 1e6:.2f} MB"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="checkpoint of train_net.py (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pth); its hash is put into its name")
    parser.add_argument("--half", action="store_true", help="half precision; loaded, it is float32 again")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.output, half=args.half)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

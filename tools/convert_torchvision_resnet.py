#!/usr/bin/env python
"""Convert a torchvision ResNet checkpoint to Detectron2's names, as weights of a detector's backbone."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import numpy as np
import torch
from d2_distill.errors import UserError

EXAMPLE = """
Example:
  python tools/convert_torchvision_resnet.py resnet18-f37072fd.pth R-18.pkl
and then, in the config of the detector:
  MODEL:
    WEIGHTS: R-18.pkl
    PIXEL_MEAN: [123.675, 116.28, 103.53]
    PIXEL_STD: [58.395, 57.12, 57.375]
    RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STRIDE_IN_1X1: False}
  INPUT:
    FORMAT: RGB
"""

_RENAMES = ((r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
            (r"^(?!res\d\.)", "stem."),
            (r"bn(\d)\.", r"conv\1.norm."),
            (r"downsample\.0\.", "shortcut."),
            (r"downsample\.1\.", "shortcut.norm."))


def convert_name(name: str) -> str:
    """Detectron2's name of a torchvision name: ``layer1.0.bn2.bias`` is ``res2.0.conv2.norm.bias``."""
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name


def convert(state_dict: Dict[str, torch.Tensor]) -> dict:
    """The content of a Detectron2 ``.pkl`` file for a torchvision ResNet's state dict.

    The classifier (``fc``) is kept, under a name that no detector has.
    """
    return {
        "model": {convert_name(name): value.detach().numpy() for name, value in state_dict.items()},
        "__author__": "torchvision",
        "matching_heuristics": True,
    }


def load_state_dict(path: Path) -> Dict[str, torch.Tensor]:
    """Read a torchvision ResNet checkpoint.

    Raises:
        UserError: the file is missing, cannot be read, or is not of a ResNet.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; download a ResNet checkpoint of torchvision first.")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a file of tensors that torch can read; download it again.") from error
    required = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
    missing = sorted(required - set(state_dict) if isinstance(state_dict, dict) else required)
    if missing:
        raise UserError(f"{path} does not hold a torchvision ResNet: it lacks {', '.join(missing)}.")
    return state_dict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="torchvision checkpoint (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pkl)")
    args = parser.parse_args()
    if args.output.suffix != ".pkl":
        raise UserError(f"{args.output} must end with .pkl, by which Detectron2 knows the format.")
    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it or choose another name.")
    converted = convert(load_state_dict(args.input))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "wb") as f:
        pickle.dump(converted, f)
    values = sum(np.size(value) for value in converted["model"].values())
    print(f"Wrote {len(converted['model'])} tensors ({values / 1e6:.1f} M values) to {args.output}.")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))

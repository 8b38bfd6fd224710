#!/usr/bin/env python
"""Convert a torchvision checkpoint to weights of a detector's backbone: ResNet, MobileNetV2 or Swin Transformer."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import numpy as np
import torch

from d2_distill.whole_files import whole_file
from d2_distill.apps.conversion import Tensors, is_state_dict, read_tensors, require_new_file
from d2_distill.checkpoint.torchvision import identified_rules
from d2_distill.errors import UserError, reported

EXAMPLE = """
train_net.py needs no conversion: it reads such files, and MODEL.WEIGHTS torchvision://resnet18 (docs/checkpoints.md).
Convert for other programs that use Detectron2.

Example:
  python tools/convert_torchvision_backbone.py resnet18-f37072fd.pth resnet18.pkl
and then, in the config of the detector:
  MODEL:
    WEIGHTS: resnet18.pkl
    PIXEL_MEAN: [123.675, 116.28, 103.53]
    PIXEL_STD: [58.395, 57.12, 57.375]
    RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STRIDE_IN_1X1: False}
  INPUT:
    FORMAT: RGB
MobileNetV2 and Swin Transformers: the same means, and BACKBONE.NAME build_mobilenet_v2_fpn_backbone or
build_swin_fpn_backbone (MODEL.SWIN.IMPLEMENTATION torchvision). For weights in torchvision's layout that were trained
elsewhere, set means, FORMAT and MODEL.MOBILENETV2.SAME_PADDING as there.
"""


def convert(state_dict: dict[str, torch.Tensor], source: str = "The checkpoint") -> dict:
    """The content of a Detectron2 ``.pkl`` file for the state dict of a torchvision model.

    ``layer1.0.bn2.bias`` of a ResNet becomes ``res2.0.conv2.norm.bias``; names of the others stay.

    Raises:
        UserError: see :func:`d2_distill.checkpoint.torchvision.identified_rules`.
    """
    tensors = Tensors(state_dict, source)
    model = tensors.take(identified_rules(state_dict, source))
    # As Detectron2's own converter names it. No detector has such names.
    model.update((f"stem.{name}", value) for name, value in tensors.left.items())
    model = {name: value.detach().numpy() for name, value in model.items()}
    return {"model": model, "__author__": "torchvision", "matching_heuristics": True}


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a torchvision checkpoint.

    Raises:
        UserError: the file is missing, cannot be read, or is not a dict of tensors.
    """
    state_dict = read_tensors(str(path))
    if not is_state_dict(state_dict):
        raise UserError(f"{path} is not a state dict, which has a tensor for each name; save model.state_dict().")
    return state_dict


def run(args: argparse.Namespace) -> None:
    require_new_file(args.output, ".pkl")
    converted = convert(load_state_dict(args.input), source=str(args.input))
    with whole_file(args.output) as path, path.open("wb") as file:
        pickle.dump(converted, file)
    values = sum(np.size(value) for value in converted["model"].values())
    print(f"Wrote {len(converted['model'])} tensors ({values / 1e6:.1f} M values) to {args.output}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="torchvision checkpoint (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pkl)")
    args = parser.parse_args()
    with reported():
        run(args)


if __name__ == "__main__":
    main()

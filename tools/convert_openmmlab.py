#!/usr/bin/env python3
"""Convert a checkpoint of OpenMMLab's MMDetection (2.x or 3.x) to a checkpoint and a config of d2_distill.

Of RetinaNet, FCOS, ATSS, GFL, GFLv2 and Faster R-CNN with ResNet or Swin Transformer and FPN, and of LD's
ATSS, FCOS and RetinaNet that predict distributions. A config is printed; it holds MODEL.WEIGHTS and all that
makes the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.conversion import require_new_file, require_pairs, save_detector
from d2_distill.apps.conversion.openmmlab import STYLES, convert_openmmlab, read_checkpoint
from d2_distill.errors import reported

EXAMPLE = """
Examples:
  python tools/convert_openmmlab.py gfl_r50_fpn_1x_coco.pth gfl.pth > gfl.yaml
  python tools/convert_openmmlab.py fcos_r101_caffe.pth fcos.pth --style caffe-detectron \\
    MODEL.FCOS.DISTANCES exp MODEL.FCOS.CENTERNESS_ON cls MODEL.FCOS.CENTER_SAMPLING_RADIUS 0.0 > fcos.yaml
and then, in the config of the student:
  MODEL: {DISTILL: {TEACHER: {CONFIG_FILE: gfl.yaml}}}
"""


def run(args: argparse.Namespace) -> None:
    require_new_file(args.output)
    require_pairs(args.opts)
    checkpoint = read_checkpoint(args.input)
    conversion = convert_openmmlab(checkpoint, style=args.style, opts=args.opts, source=args.input)
    save_detector(conversion, args.output, source=args.input)
    print(conversion.yaml(WEIGHTS=str(args.output)), end="")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="checkpoint of MMDetection (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pth)")
    parser.add_argument(
        "--style",
        choices=list(STYLES),
        help="layout of the ResNet and pixel statistics, for a checkpoint that does not hold its config: "
        "torchvision's with RGB, or Caffe's with BGR and the means of Detectron (zoo's FCOS) or Detectron2",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys that override what was found"
    )
    return parser


def main() -> None:
    args = parser().parse_intermixed_args()
    with reported():
        run(args)


if __name__ == "__main__":
    main()

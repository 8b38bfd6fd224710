#!/usr/bin/env python3
"""Convert a detector of torchvision.models.detection to a checkpoint and a config of d2_distill.

Of RetinaNet, FCOS and Faster R-CNN, both versions, with a ResNet and FPN, as published or trained on other classes.
A config is printed; it holds MODEL.WEIGHTS and all that makes the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.conversion import require_new_file, require_pairs, save_detector
from d2_distill.apps.conversion.torchvision import convert_torchvision, read_state_dict
from d2_distill.errors import reported

EXAMPLE = """
Examples, for a published detector and for one that was fine-tuned on classes of one's own:
  python tools/convert_torchvision_detector.py fcos_resnet50_fpn_coco-99b0c9b7.pth fcos.pth > fcos.yaml
  python tools/convert_torchvision_detector.py mine.pth fasterrcnn.pth --classes "apple,pear" --frozen-bn-eps 0 \\
    INPUT.MIN_SIZE_TEST 640 > fasterrcnn.yaml
and then, in the config of the student:
  MODEL: {DISTILL: {TEACHER: {CONFIG_FILE: fcos.yaml}}}
"""


def run(args: argparse.Namespace) -> None:
    require_new_file(args.output)
    require_pairs(args.opts)
    conversion = convert_torchvision(
        read_state_dict(args.input),
        classes=[name.strip() for name in args.classes.split(",")] if args.classes else [],
        frozen_bn_eps=args.frozen_bn_eps,
        opts=args.opts,
        source=args.input,
    )
    save_detector(conversion, args.output, source=args.input)
    print(conversion.yaml(WEIGHTS=str(args.output)), end="")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="checkpoint of torchvision: a state dict, or a dict that holds one (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pth)")
    parser.add_argument(
        "--classes",
        metavar="NAME,NAME,...",
        help="names of the classes in the order of the labels, without the background; the 91 outputs of the "
        "published detectors become COCO's 80 classes without it",
    )
    parser.add_argument(
        "--frozen-bn-eps",
        type=float,
        metavar="EPS",
        help="what frozen batch norms add to the variance: 0 if training started from torchvision's COCO weights of "
        "RetinaNet or Faster R-CNN, else 1e-5; asked for where no tensor tells",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys that override what was found")
    return parser


def main() -> None:
    args = parser().parse_intermixed_args()
    with reported():
        run(args)


if __name__ == "__main__":
    main()

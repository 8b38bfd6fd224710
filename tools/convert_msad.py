#!/usr/bin/env python3
"""Convert a checkpoint of the published MSAD code (teacher or student) to one of d2_distill.

The config is that of the model, such as those in configs/msad/reference/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.conversion import is_state_dict, read_tensors, require_new_file, save_converted
from d2_distill.apps.conversion.msad import convert_msad
from d2_distill.config.reading import read_config
from d2_distill.detectors.building import build_detector
from d2_distill.errors import UserError, reported

EXAMPLE = """
Examples, for a teacher and a student:
  python tools/convert_msad.py MSAD-SLR050-50-T.pth teacher.pth \\
    --config-file configs/msad/reference/fcos_SLR50_FPN_1x_ms_teacher.yaml
  python tools/convert_msad.py MSAD-SLR050-50-S.pth student.pth \\
    --config-file configs/msad/reference/fcos_SLR50_FPN_1x_ms_student.yaml
and then
  python train_net.py --eval-only --config-file ...teacher.yaml MODEL.WEIGHTS teacher.pth
"""


def run(args: argparse.Namespace) -> None:
    require_new_file(args.output)
    content = read_tensors(args.input)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not is_state_dict(state):
        raise UserError(f"{args.input} holds no state dict of a detector; name a checkpoint of MSAD.")
    # The checkpoint, not the data that the config names, has the number of classes.
    source = f"The config ({args.config_file} with the command line's KEY VALUE)"
    cfg = read_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts], source=source)
    model = build_detector(cfg)
    conversion = convert_msad(state, model, args.input)
    save_converted(conversion.state_dict, model, args.output, source=args.input, key=args.input)
    print(f"Left out {len(conversion.dropped)} tensors that the model does without", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="checkpoint of MSAD (.pth)")
    parser.add_argument("output", type=Path, help="file to write (.pth)")
    parser.add_argument("--config-file", required=True, help="config of the model")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys that override the file")
    return parser


def main() -> None:
    args = parser().parse_intermixed_args()
    with reported():
        run(args)


if __name__ == "__main__":
    main()

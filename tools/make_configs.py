#!/usr/bin/env python3
"""Writes configs of a teacher, a smaller student, and the student with its teacher, made from your data.

    python tools/make_configs.py --train-data mine/train.json mine/images --test-data mine/val.json mine/images --output configs/mine
    python tools/make_configs.py --train-data bccd trainval --test-data bccd test --output configs/cells --from-scratch --budget 10min

Image size, anchors, batch, learning rate and length follow from the objects and the number of images; each value has a
comment. docs/recipe.md has the rules.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.recipe.choices import SIZES
from d2_distill.apps.recipe.detectors import HEADS
from d2_distill.apps.recipe.making import inspect, make_recipe, parsed, write
from d2_distill.apps.recipe.timing import measure
from d2_distill.apps.recipe.writing import Recipe
from d2_distill.data.own_sets import add_data_arguments
from d2_distill.detectors.building import build_detector
from d2_distill.engine.run_summary import Cost
from d2_distill.errors import UserError, reported
from d2_distill.whole_files import require_free

_UNITS = {"s": 1, "min": 60, "h": 3600}


def budget(text: str) -> float:
    """Seconds of "90s", "10min" or "1.5h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text.strip())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10min or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


def report(recipe: Recipe) -> str:
    """What was chosen, and the commands that come next."""
    lines = [f"Images of {recipe.side} x {recipe.shorter_side} px: {recipe.size_report()}.", ""]
    costs = {}
    for role in ("teacher", "student"):
        cfg = parsed(recipe.config(role, ""))
        cost = costs[role] = Cost.of(build_detector(cfg), (recipe.shorter_side, recipe.side))
        backbone, schedule = getattr(recipe, role), recipe.schedules[role]
        lines.append(
            f"{role}: {recipe.head} on {backbone.name}, {cost}; {schedule.iterations} iterations of {schedule.batch} images, "
            f"{schedule.passes:.3g} passes"
        )
    if not costs["student"] < costs["teacher"]:
        raise UserError("The student would not be smaller than its teacher; choose another --size or --head.")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    if not args.train_data:
        raise UserError("--train-data is missing; name annotations and images to train on.")
    for role in ("teacher", "student", "distilled"):
        require_free(args.output / f"{role}.yaml", overwrite=args.overwrite, option="--output")
    cfg, train = inspect(args.train_data, args.test_data)
    recipe = make_recipe(
        cfg, train, name=args.output.resolve().name, head=args.head, size=args.size, pretrained=not args.from_scratch,
        budget=args.budget and budget(args.budget), budget_text=args.budget, measure=measure,
    )
    print(report(recipe))
    teacher, student, distilled = write(recipe, args.output, overwrite=args.overwrite)
    if not args.test_data:
        print("There is no --test-data, so nothing will be evaluated; name some to know what you get.")
    runs = f"output/{recipe.name}"
    print(
        f"\nNext:\n  python train_net.py --config-file {teacher}\n  python train_net.py --config-file {distilled}\n"
        f"  python tools/export.py onnx --config-file {runs}/distilled/config.yaml --output {recipe.name}.onnx "
        f"MODEL.WEIGHTS {runs}/distilled/model_final.pth\n"
        f"To compare with the plain student:\n  python train_net.py --config-file {student}\n"
        f"  python tools/compare.py plain={runs}/student {runs}/distilled --baseline plain"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the three configs")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the detectors and images (default: %(default)s)")
    parser.add_argument("--head", choices=HEADS, default="GFL", help="detector; GFL learns fastest from small data (default: %(default)s)")
    parser.add_argument(
        "--from-scratch", action="store_true", help="narrow ResNets from random weights, where ImageNet's cannot be had"
    )
    parser.add_argument("--budget", metavar="TIME", help="longest time of one training on this machine, such as 10min or 2h")
    parser.add_argument("--overwrite", action="store_true", help="replace configs that are there")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.budget:
        try:
            budget(args.budget)
        except argparse.ArgumentTypeError as error:
            parser().error(f"argument --budget: {error}")
    with reported():
        run(args)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Finds every problem of the data sets of a config, or of any others, at once, and tells what they consist of.

    python tools/check_data.py --config-file configs/bccd/student.yaml --draw output/samples
    python tools/check_data.py --train-data mine/train.json mine/images --test-data mine/val.json mine/images

Errors are what training or evaluation would stop at; warnings deserve a look. The exit status is 1 if there are errors, else
0. Nothing is written but the samples of --draw.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.apps.command_line.progress import StepProgress
from d2_distill.apps.data_check.inspection import TRAIN, Inspection, inspect_annotations, inspect_images, samples
from d2_distill.apps.data_check.statistics import class_table, set_table
from d2_distill.apps.pictures import class_color, draw_boxes, ground_truth, name_of, write_picture
from d2_distill.apps.recipe.objects import Objects
from d2_distill.apps.recipe.table import scale_table
from d2_distill.config.model_zoo import find_config
from d2_distill.config.reading import read_config
from d2_distill.data.own_sets import add_data_arguments, name_data
from d2_distill.data.problems import Kind, Problem
from d2_distill.errors import reported


def report(inspections: Sequence[Inspection], examples: int) -> str:
    """All problems, grouped by data set and kind, and tables."""
    lines: list[str] = []
    for inspection in inspections:
        lines.append(f"{inspection.name} ({', '.join(inspection.keys)}): {inspection.source or 'not found'}")
        groups: dict[Kind, list[Problem]] = {}
        for problem in inspection.problems:
            groups.setdefault(problem.kind, []).append(problem)
        for kind, group in sorted(groups.items(), key=lambda item: not item[0].is_error):
            word = "error" if kind.is_error else "warning"
            lines.append(f"  {word:7} {len(group):6} x {kind.title}: {kind.remedy}")
            lines += [f"{'':21}{_shortened(problem.sentence, inspection)}" for problem in group[:examples]]
            if len(group) > examples:
                lines.append(f"{'':21}and {len(group) - examples} more")
        if not groups:
            lines.append("  nothing to complain of")
        lines.append("")
    lines += [set_table(inspections), "", class_table(inspections), ""]
    annotated = [row for each in inspections if TRAIN in each.keys for row in each.records if row["annotations"]]
    if annotated:
        lines += ["Objects to train on, at the image sizes of tools/make_configs.py:", ""]
        lines += [scale_table(Objects.from_records(annotated)), ""]
    kinds = Counter(p.kind.is_error for each in inspections for p in each.problems)
    lines.append(f"{kinds[True]} errors, {kinds[False]} warnings")
    return "\n".join(lines)


def _shortened(sentence: str, inspection: Inspection) -> str:
    for prefix in inspection.prefixes:
        sentence = sentence.replace(prefix, "")
    return sentence


def draw(inspection: Inspection, folder: Path, number: int) -> None:
    """Write some images of a data set with their boxes; crowds are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (record, image) in enumerate(samples(inspection, number), start=1):
        truth = ground_truth(record)
        labels = [name_of(category, inspection.class_names) for category in truth.gt_classes]
        colors = [class_color(int(category)) for category in truth.gt_classes]
        picture = draw_boxes(image, truth.gt_boxes.tensor, labels, colors)
        write_picture(picture, folder / f"{inspection.name}_{index:02d}_{Path(record['file_name']).stem}.jpg")


def run(args: argparse.Namespace) -> bool:
    """Whether there are no errors."""
    config_file = args.config_file and find_config(args.config_file, key="--config-file")
    cfg = read_config(config_file, args.opts, source=f"The config ({config_file or 'the default config'})")
    name_data(cfg, args.train_data, args.test_data)
    inspections = inspect_annotations(cfg)
    files = {record["file_name"] for each in inspections for record in each.records}
    progress = StepProgress("images", len(files))
    inspect_images(inspections, decode=args.decode, step=progress.step)
    print(report(inspections, args.examples))
    if args.draw is not None:
        for inspection in inspections:
            draw(inspection, args.draw, args.images)
        print(f"Samples are in {args.draw}")
    return not any(problem.kind.is_error for each in inspections for problem in each.problems)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="config whose data sets are checked")
    add_data_arguments(parser)
    parser.add_argument(
        "--no-decode", dest="decode", action="store_false",
        help="read only the head of each image file: faster, but broken images and those that look alike are not found",
    )
    parser.add_argument("--examples", type=whole_number(0), default=3, help="shown of each kind of problem (default: %(default)s)")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write images with their boxes there")
    parser.add_argument("--images", type=whole_number(1), default=12, help="of each data set, for --draw (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override the file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with reported():
        good = run(args)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares finished runs: tables, plots, and their detections side by side.

    python tools/compare.py output/teacher plain=output/student output/distilled/seed* --output output/comparison

prints a table with a row a model, and writes comparison.md (everything), comparison.csv (a line a run, all its numbers),
ap.png, losses.png, cost.png, classes.png and detections.png. Runs that differ in their seed alone are one row, mean ± standard
deviation; so are runs that are given the same NAME. docs/comparing.md tells what the columns mean and how to read them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.apps.command_line.progress import Progress
from d2_distill.apps.comparison.groups import group_runs
from d2_distill.apps.comparison.report import Options, compare_runs, require_folder, screen, write
from d2_distill.apps.comparison.runs import read_run
from d2_distill.errors import reported


def named_folder(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER``, whose name is "" then."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).is_dir():  # a folder may have "=" in its name
        return "", Path(text)
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is neither FOLDER nor NAME=FOLDER")
    return name, Path(folder)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "runs", nargs="+", type=named_folder, metavar="[NAME=]FOLDER",
        help="output folder of a run; the name of a model, by default the folder's, may be given to several",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/comparison"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--baseline", default="", metavar="NAME", help="also show the differences to this model")
    parser.add_argument(
        "--test-set", default="", metavar="NAME", help="of DATASETS.TEST (default: the first of the first run)"
    )
    parser.add_argument("--unfinished", action="store_true", help="compare unfinished runs as they stand, marked with *")
    parser.add_argument("--no-speed", action="store_true", help="do not measure images/s")
    parser.add_argument(
        "--images", type=whole_number(0), default=6, metavar="N",
        help="test images to draw, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--pick", choices=("spread", "differ"), default="spread",
        help="draw images spread over the test set, or those on which the models differ most (default: %(default)s)",
    )
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="SCORE", help="of drawn detections (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    options = Options(
        baseline=args.baseline, test_set=args.test_set, speed=not args.no_speed, images=args.images,
        score_threshold=args.score_threshold, pick=args.pick,
    )
    with reported(), Progress() as progress:
        require_folder(args.output)
        runs = [(name, read_run(folder, unfinished=args.unfinished)) for name, folder in args.runs]
        comparison = compare_runs(group_runs(runs), options, progress=progress)
        progress("")
        print(screen(comparison), flush=True)
        written = write(comparison, args.output, progress=progress)
    for note in comparison.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"\nWritten to {args.output}: {', '.join(written)}")


if __name__ == "__main__":
    main()

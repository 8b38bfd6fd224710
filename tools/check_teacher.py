#!/usr/bin/env python3
"""Evaluates a teacher on images of your data, and says whether it is good enough to teach. Nothing is trained.

    python tools/check_teacher.py --config-file configs/bccd/distilled.yaml
    python tools/check_teacher.py --config-file configs/bccd/distilled.yaml \\
        --student-weights output/bccd/student/model_final.pth --json output/bccd/teacher_check.json

The config is that of a distillation, whose MODEL.DISTILL.TEACHER is checked on the student's images and classes; or
a student's, with the keys MODEL.DISTILL.TEACHER.CONFIG_FILE and .WEIGHTS behind it; or a teacher's own, with
MODEL.WEIGHTS.
docs/teachers.md explains the verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  before detectron2: chooses which one is imported

# isort: split
from detectron2.config import CfgNode
from tabulate import tabulate

from d2_distill.apps.command_line.arguments import whole_number
from d2_distill.whole_files import whole_file
from d2_distill.apps.command_line.progress import Progress
from d2_distill.apps.teacher_check import GOOD, check_teacher
from d2_distill.data.checks import check_datasets
from d2_distill.data.registration import register_datasets
from d2_distill.detectors.building import DISTILLER
from d2_distill.engine.evaluate import load_detector
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError, reported
from d2_distill.teacher import Teacher

LISTED = 5  # files that are named


def with_teacher(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> CfgNode:
    """The config; where it names no teacher, it is taken for the teacher's own.

    Raises:
        UserError: it is a distillation without a teacher.
    """
    if cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
        return cfg
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        raise UserError(
            f"{config_file} names no teacher; set MODEL.DISTILL.TEACHER.CONFIG_FILE and MODEL.DISTILL.TEACHER.WEIGHTS."
        )
    cfg = cfg.clone()
    cfg.defrost()
    teacher = cfg.MODEL.DISTILL.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS, teacher.OPTS = config_file, cfg.MODEL.WEIGHTS, list(opts)
    cfg.freeze()
    return cfg


def choose_data_set(cfg: CfgNode, split: str) -> str:
    """The first data set of ``DATASETS.TEST`` or ``DATASETS.TRAIN``, checked.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    key = f"DATASETS.{split.upper()}"
    if not cfg.DATASETS[split.upper()]:
        raise UserError(f"{key} is empty; name a data set there, or choose the other one by --on.")
    check_datasets(cfg, train=split == "train")
    return cfg.DATASETS[split.upper()][0]


@contextlib.contextmanager
def _log_shown(name: str) -> Iterator[None]:
    """Show what a logger says of interest, such as which classes were matched, among the errors."""
    shown, handler = logging.getLogger(name), logging.StreamHandler()
    level = shown.level
    shown.addHandler(handler)
    shown.setLevel(logging.INFO)
    try:
        yield
    finally:
        shown.removeHandler(handler)
        shown.setLevel(level)


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    cfg = with_teacher(load_config(args.config_file, args.opts), args.config_file, args.opts)
    register_datasets(cfg)
    data_set = choose_data_set(cfg, args.on)
    with _log_shown("d2_distill.teacher"):
        teacher = Teacher.from_config(cfg)
    student = None
    if args.student_weights:
        student_cfg = cfg.clone()
        student_cfg.defrost()
        student_cfg.MODEL.WEIGHTS = args.student_weights
        student = load_detector(student_cfg, weights_key="--student-weights").eval()
    report = check_teacher(
        cfg, teacher, data_set, images=args.images, probe=args.probe, student=student, progress=progress
    )
    about = {
        "config": cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE,
        "weights": teacher.cfg.MODEL.WEIGHTS,
        "kind": teacher.staged.kind,
        "fingerprint": teacher.fingerprint(),
    }
    return {"teacher": about, "on": args.on, **report}


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    about = report["teacher"]
    lines = [
        f"Teacher: {about['kind']} of {about['config']}, weights {about['weights']}",
        f"Data:    {report['images']} images of {report['data_set']} (DATASETS.{report['on'].upper()})",
    ]
    if report["on"] == "train":
        lines.append("         If it was trained on them, it does better here than on images that are new to it.")
    rows = [["teacher", *(_number(report[name]) for name in ("AP", "AP50", "AP75"))]]
    if "student" in report:
        rows.append(["student", *(_number(report["student"][name]) for name in ("AP", "AP50", "AP75"))])
    lines += ["", _table(rows, ("", "AP", "AP50", "AP75")), ""]
    rows = [
        [row["name"], row["objects"], _number(row["AP"]), _share(row["recall"]), _number(row["mean_score_of_right"], 2)]
        for row in report["classes"] if row["objects"] or len(report["classes"]) <= 20
    ]
    lines.append(_table(rows, ("class", "objects", "AP", "recall", "score of right ones")))
    absent = len(report["classes"]) - len(rows)
    if absent:
        lines.append(f"{absent} other classes have no object in these images.")
    lines.append("")
    nothing = report["nothing_found_in"]
    lines.append(f"Images of whose objects none is found: {len(nothing)} of {report['images_with_objects']}")
    lines += [f"  {name}" for name in nothing[:LISTED]] + ["  ..."] * (len(nothing) > LISTED)
    right, sure = _number(report["mean_score_of_right"], 2), report["precision_of_sure"]
    sure = "none scores 0.5 or more" if math.isnan(sure) else f"of those that score 0.5 or more {_share(sure)} are right"
    lines.append(f"Mean score of right detections: {right}; {sure}")
    if "probe" in report:
        probe = report["probe"]
        lines.append(f"AP50 on {probe['images']} of the images, prepared as the configs say: {_number(probe['AP50'])}")
        lines += [f"  {row['name']}: {_number(row['AP50'])}" for row in probe["prepared_otherwise"]]
    return "\n".join([*lines, "", verdict_of(report)])


def verdict_of(report: dict[str, Any]) -> str:
    """One sentence."""
    if report["verdict"] == GOOD:
        reasons = [f"AP50 {_number(report['AP50'])}, and nothing speaks against it"]
    else:
        reasons = report["reasons"]
    return f"Verdict: {report['verdict']} to teach: {'; '.join(reasons)}."


def write_json(report: dict[str, Any], path: Path) -> None:
    """The file appears complete or not at all; what is not a number becomes null."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(_without_nan(report), indent=1) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(rows: list[list[Any]], headers: Sequence[str]) -> str:
    alignment = ("left",) + ("right",) * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def _number(value: float, decimals: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--images", type=whole_number(1), default=100, metavar="N",
        help="evenly spread over the data set (default: %(default)s)",
    )
    parser.add_argument(
        "--on", choices=("test", "train"), default="test",
        help="the first data set of DATASETS.TEST or of DATASETS.TRAIN (default: %(default)s)",
    )
    parser.add_argument("--student-weights", metavar="FILE", help="checkpoint of the plain student, to compare with")
    parser.add_argument(
        "--probe", type=whole_number(0), default=20, metavar="N",
        help="of the images, so many are also tried with other colours, statistics and sizes (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys and values")
    args = parser.parse_args(arguments)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with reported(), Progress() as progress:
        report = run(args, progress)
        if args.json:
            write_json(report, args.json)
    print(text_of(report))


if __name__ == "__main__":
    main()

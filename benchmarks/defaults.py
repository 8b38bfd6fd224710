#!/usr/bin/env python3
"""Measure what distillation brings over plain students that have converged, by several seeds on three data sets.

    python benchmarks/defaults.py run --rows plain auto --seeds 1 2 3
    python benchmarks/defaults.py run --settings helmets_gfl --rows LD LD-published
    python benchmarks/defaults.py table

Each run is train_net.py on a config of benchmarks/defaults/SETTING/. One that was interrupted continues, and one that
is in the results already is skipped, so the same command can be given again and again. Results go to
benchmarks/defaults/results.csv, one line a run, with the commit and the command. Put helmets/ and bccd/ below
$DETECTRON2_DATASETS (datasets/README.md), and make the scenes by datasets/prepare_quickstart.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("benchmarks/defaults")
RUNS = Path("output/benchmarks/defaults")
RESULTS = FOLDER / "results.csv"
# Settings, and their detector.
SETTINGS = {"scenes_retinanet": "RetinaNet", "blood_fcos": "OpenMMLabFCOS", "helmets_gfl": "GFL"}
METHODS = ("CrossKD", "PKD", "LD", "FeatureImitation", "HEAD", "TFHEAD")
TEACHER, PLAIN, AUTO, PUBLISHED = "teacher", "plain", "auto", "-published"
COLUMNS = ("setting", "row", "seed", "iterations", "AP", "AP50", "AP75", "curve", "minutes", "commit", "command")
# What brings the released form back: means over the classes, iterations of the published schedules.
RELEASED = ["MODEL.DISTILL.BALANCE", "published", "MODEL.DISTILL.LD.REFERENCE_CLASSES", "0"]
# What --teacher says by itself, and R-CNN assistants that are small enough for the CPU.
WITHOUT_TEACHER = ["MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILL.BALANCE", "auto"]
SMALL_ASSISTANT = ["MODEL.ROI_BOX_HEAD.FC_DIM", "256", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are missing, teachers first")
    rows = [TEACHER, PLAIN, AUTO, *METHODS, *(method + PUBLISHED for method in METHODS)]
    run.add_argument("--rows", nargs="+", default=[PLAIN, AUTO], choices=rows, metavar="ROW", help=", ".join(rows))
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    for command in (run, commands.add_parser("table", help="print mean differences to the plain student")):
        command.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS, metavar="SETTING")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.command == "run":
        for setting in args.settings:
            make(setting, TEACHER, 1)
            for seed in args.seeds:
                for row in args.rows:
                    make(setting, row, seed)
    print_table(args.settings)


def make(setting: str, row: str, seed: int) -> None:
    """Train, unless the results have it already."""
    if any(found["setting"] == setting and found["row"] == row and found["seed"] == str(seed) for found in results()):
        return
    output = RUNS / setting / f"{row}_{seed}"
    command = ["train_net.py", "--resume", "--config-file", str(FOLDER / setting / _config(row))]
    if _learns_from_teacher(row):
        command += ["--teacher", str(RUNS / setting / f"{TEACHER}_1")]
    command += [*options(setting, row), "SEED", str(seed), "OUTPUT_DIR", str(output)]
    print(f"{setting} {row} {seed}: python {shlex.join(command)}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.log", "a") as log:
        subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=subprocess.STDOUT)
    append(setting, row, seed, output, command)


def _config(row: str) -> str:
    return "teacher.yaml" if row == TEACHER else "student.yaml"


def _learns_from_teacher(row: str) -> bool:
    return row not in (TEACHER, PLAIN) and not row.startswith("TFHEAD")


def options(setting: str, row: str) -> list[str]:
    """Return the config overrides of a row."""
    if row in (TEACHER, PLAIN, AUTO):
        return []
    found = ["MODEL.DISTILL.METHODS", row.replace(PUBLISHED, "")]
    if not _learns_from_teacher(row):
        found += [*WITHOUT_TEACHER, "MODEL.DISTILL.STUDENT", SETTINGS[setting], *SMALL_ASSISTANT]
    return found + (RELEASED if row.endswith(PUBLISHED) else [])


def append(setting: str, row: str, seed: int, output: Path, command: list[str]) -> None:
    """Add a line with the results of a finished run."""
    with open(output / "metrics.json") as file:
        scalars = [json.loads(line) for line in file]
    with open(output / "config.yaml") as file:
        iterations = yaml.safe_load(file)["SOLVER"]["MAX_ITER"]
    evaluated = [line for line in scalars if "bbox/AP" in line]
    # The evaluation after the last step is recorded one iteration later.
    curve = {min(line["iteration"] + 1, iterations): line["bbox/AP"] for line in evaluated}
    last = evaluated[-1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({
            "setting": setting, "row": row, "seed": seed, "iterations": iterations,
            **{name: f"{last[f'bbox/{name}']:.2f}" for name in ("AP", "AP50", "AP75")},
            "curve": " ".join(f"{iteration}:{value:.1f}" for iteration, value in curve.items()),
            "minutes": f"{max(line.get('train_seconds', 0) for line in scalars) / 60:.1f}",
            "commit": commit, "command": shlex.join(["python", *command]),
        })


def results() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def interval(differences: list[float]) -> float:
    """Return half of the width of the 95 % interval of the mean, by Student's t."""
    from scipy import stats

    if len(differences) < 2:
        return math.nan
    return stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))


def print_table(settings: Iterable[str]) -> None:
    """Print AP, and differences to the plain student of the same seed, as Markdown; the last lines pool the settings."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in results():
        if line["setting"] in settings:
            found[line["setting"]][line["row"]][int(line["seed"])] = float(line["AP"])
    pooled: dict[str, list[float]] = defaultdict(list)
    print("| setting | row | AP, by seed | difference to plain, 95 % interval |\n|---|---|---|---|")
    for setting, rows in found.items():
        for row, by_seed in rows.items():
            scores = ", ".join(f"{by_seed[seed]:.1f}" for seed in sorted(by_seed))
            plain = rows.get(PLAIN, {})
            pairs = [by_seed[seed] - plain[seed] for seed in sorted(by_seed) if seed in plain]
            text = ""
            if row not in (TEACHER, PLAIN) and pairs:
                pooled[row] += pairs
                text = f"{statistics.mean(pairs):+.2f} ± {interval(pairs):.2f}"
            print(f"| {setting} | {row} | {scores} | {text} |")
    for row, pairs in pooled.items():
        print(f"| all | {row} | | {statistics.mean(pairs):+.2f} ± {interval(pairs):.2f} ({len(pairs)} pairs) |")


if __name__ == "__main__":
    main()

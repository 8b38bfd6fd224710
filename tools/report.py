"""Compares finished runs: a table, the curves of their training, and their detections side by side."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  chooses the Detectron2 that the imports below find
import torch
from d2_distill.config import get_distill_cfg
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError
from d2_distill.evaluation.complexity import count_flops, count_parameters
from d2_distill.student import build_student
from d2_distill.visualization import draw_boxes, ground_truth, name_of, new_figure
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
from detectron2.structures import Instances
from tabulate import tabulate
from torch import nn
from torchvision.ops import box_iou

Curves = Dict[str, Dict[int, float]]  # name of a scalar -> iteration -> value
Record = Dict[str, Any]  # an image and its annotations, in Detectron2's standard form


@dataclass
class Run:
    """A finished run: its configuration, the scalars it wrote, and its detector with the final weights."""

    name: str
    cfg: CfgNode
    curves: Curves
    model: nn.Module

    @property
    def test_set(self) -> str:
        return self.cfg.DATASETS.TEST[0]

    def last(self, scalar: str) -> float:
        curve = self.curves[scalar]
        return curve[max(curve)]

    def read(self, record: Record) -> Dict[str, Any]:
        """The image of a dataset record as this run's model wants it."""
        return DatasetMapper(self.cfg, is_train=False)(record)

    def detect(self, record: Record, threshold: float) -> Instances:
        with torch.no_grad():
            instances = self.model([self.read(record)])[0]["instances"].to("cpu")
        return instances[instances.scores >= threshold]


def load_run(name: str, folder: Path) -> Run:
    """Read ``config.yaml``, ``metrics.json`` and ``model_final.pth`` of a run's output folder.

    Raises:
        UserError: one of them is missing, or they do not belong together.
    """
    for file_name in ("config.yaml", "metrics.json", "model_final.pth"):
        if not (folder / file_name).is_file():
            raise UserError(
                f"{folder} has no {file_name}, so the run {name!r} is not finished; "
                "train it to its end (train_net.py with --resume goes on where it stopped)."
            )
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_datasets(cfg)
    if not cfg.DATASETS.TEST:
        raise UserError(f"{folder / 'config.yaml'} names no data set in DATASETS.TEST; the report needs one.")
    curves = read_curves(folder / "metrics.json")
    if "bbox/AP" not in curves:
        raise UserError(
            f"{folder / 'metrics.json'} holds no bbox/AP, so the run was not evaluated; "
            "train with a data set in DATASETS.TEST."
        )
    model = build_student(cfg).eval()
    state = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problems = " ".join(str(error).split())
        raise UserError(
            f"{folder / 'model_final.pth'} does not fit the config.yaml beside it ({problems}); "
            "name a folder whose files are of one run."
        ) from None
    return Run(name=name, cfg=cfg, curves=curves, model=model)


def read_curves(path: Path) -> Curves:
    """The scalars of a metrics.json; where a resumed run repeated an iteration, the later value counts."""
    curves: Curves = defaultdict(dict)
    for line in path.read_text().splitlines():
        try:
            scalars = json.loads(line)
        except ValueError:  # a killed run may leave half a line
            continue
        iteration = scalars.pop("iteration")
        for name, value in scalars.items():
            curves[name][iteration] = value
    return dict(curves)


def make_table(runs: List[Run], record: Record) -> str:
    """One row a run; multiply-adds are counted on the image of ``record``."""
    rows = []
    for run in runs:
        seconds = run.last("train_seconds") if "train_seconds" in run.curves else None
        rows.append([
            run.name,
            f"{count_parameters(run.model) / 1e6:.3g} M",
            f"{count_flops(run.model, [run.read(record)]) / 1e9:.3g}",
            *(f"{run.last(f'bbox/{metric}'):.1f}" for metric in ("AP", "AP50", "AP75")),
            "unknown" if seconds is None else str(datetime.timedelta(seconds=round(seconds))),
        ])
    headers = ("model", "parameters", "GFLOPs", "AP", "AP50", "AP75", "training time")
    alignment = ("left",) + ("right",) * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def draw_curves(runs: List[Run], path: Path) -> None:
    """AP, the total loss and every term of it against the iterations, one panel each."""
    names = sorted({name for run in runs for name in run.curves if "loss" in name} - {"total_loss"})
    names = ["bbox/AP", "total_loss", *names]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = new_figure(rows, columns, width=5, height=3.4)
    for index, panel in enumerate(panels.flat):
        if index >= len(names):
            panel.set_axis_off()
            continue
        for color, run in enumerate(runs):
            curve = sorted(run.curves.get(names[index], {}).items())
            if curve:
                marker = "o" if len(curve) < 15 else None
                panel.plot(*zip(*curve), label=run.name, color=f"C{color}", marker=marker)
        panel.set_title(names[index])
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=100)


def draw_detections(runs: List[Run], records: List[Record], threshold: float, path: Path) -> None:
    """One row an image: the ground truth, then each run's detections that score at least ``threshold``."""
    classes = MetadataCatalog.get(runs[0].test_set).thing_classes
    figure, panels = new_figure(len(records), 1 + len(runs), width=3, height=3.1)
    for row, record in zip(panels, records):
        image, truth = detection_utils.read_image(record["file_name"], "RGB"), ground_truth(record)
        names = [name_of(c, classes) for c in truth.gt_classes]
        row[0].imshow(draw_boxes(image, truth.gt_boxes.tensor, names, ["lime"] * len(truth)))
        for panel, run in zip(row[1:], runs):
            found = run.detect(record, threshold)
            names = [f"{name_of(c, classes)} {score:.0%}" for c, score in zip(found.pred_classes, found.scores)]
            colors = ["lime" if right else "red" for right in _right(found, truth)]
            panel.imshow(draw_boxes(image, found.pred_boxes.tensor, names, colors))
    for panel, title in zip(panels[0], ["ground truth", *(run.name for run in runs)]):
        panel.set_title(title)
    for panel in panels.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=100)


def _right(found: Instances, truth: Instances) -> List[bool]:
    """Whether each detection lies on an object of its class (IoU of at least 0.5)."""
    overlap = box_iou(found.pred_boxes.tensor, truth.gt_boxes.tensor) >= 0.5
    return (overlap & (found.pred_classes[:, None] == truth.gt_classes)).any(dim=1).tolist()


def report(runs: List[Run], output: Path, *, images: int, threshold: float) -> str:
    """Write ``report.md``, ``curves.png`` and ``detections.png`` to ``output``; return the table."""
    test_sets = {run.name: run.test_set for run in runs}
    if len(set(test_sets.values())) > 1:
        raise UserError(
            f"The runs were evaluated on different data sets: {test_sets}; report on those of one data set."
        )
    records = DatasetCatalog.get(runs[0].test_set)
    records = records[:: max(1, len(records) // images)][:images]
    table = make_table(runs, records[0])
    output.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, output / "curves.png")
    draw_detections(runs, records, threshold, output / "detections.png")
    (output / "report.md").write_text(
        f"{table}\n\n"
        f"Evaluated on {runs[0].test_set}. "
        "GFLOPs: 10^9 multiply-adds of the convolutions and linear layers for one image.\n\n"
        "![Average precision and losses](curves.png)\n\n"
        f"Detections with a score of at least {threshold:g}, "
        "green on an object of their class (IoU of at least 0.5), else red.\n\n"
        "![Ground truth and detections](detections.png)\n"
    )
    return table


def _named_folder(text: str):
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python tools/report.py --run teacher=output/teacher --run student=output/student "
        "--output output/report",
    )
    parser.add_argument(
        "--run",
        dest="runs",
        metavar="NAME=FOLDER",
        type=_named_folder,
        action="append",
        required=True,
        help="a name for the table and the output folder of a finished run; may be repeated",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the pictures")
    parser.add_argument("--images", type=int, default=6, help="test images to draw (default: %(default)s)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="of the drawn detections (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    try:
        runs = [load_run(name, folder) for name, folder in args.runs]
        print(report(runs, args.output, images=args.images, threshold=args.score_threshold))
    except UserError as error:
        sys.exit(str(error))
    print(f"\nWritten: {args.output}/report.md, curves.png, detections.png")


if __name__ == "__main__":
    main()

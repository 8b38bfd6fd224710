"""What a training left in its output folder."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

from ...config.reading import read_config
from ...errors import UserError

Curves = dict[str, dict[int, float]]  # name of a scalar -> iteration -> value
FINAL = "model_final.pth"


@dataclass(frozen=True)
class Run:
    """A run: its configuration and the scalars that it wrote.

    Attributes:
        folder: as the user named it.
        checkpoint: the final one, or of an unfinished run the last; None if it has written none.
    """

    folder: Path
    cfg: CfgNode
    curves: Curves
    checkpoint: Path | None
    finished: bool

    @property
    def iterations(self) -> int:
        """How many training steps the written scalars cover."""
        return max(self.curves.get("total_loss", {-1: 0.0})) + 1

    def last(self, scalar: str) -> float | None:
        """The latest value of a scalar; None if it was never written."""
        curve = self.curves.get(scalar)
        return curve[max(curve)] if curve else None

    def metric_curves(self, test_set: str) -> Curves:
        """The curves of AP, AP50, AP-cat and so on, on one of the data sets of ``DATASETS.TEST``."""
        # Detectron2 names the data set only where there are several.
        prefix = "bbox/" if len(self.cfg.DATASETS.TEST) == 1 else f"{test_set}/bbox/"
        return {name[len(prefix) :]: curve for name, curve in self.curves.items() if name.startswith(prefix)}

    def metrics(self, test_set: str) -> dict[str, float]:
        """The values of the last evaluation."""
        return {name: curve[max(curve)] for name, curve in self.metric_curves(test_set).items()}


def read_run(folder: Path, *, unfinished: bool = False) -> Run:
    """Read ``config.yaml`` and ``metrics.json`` of a run's output folder, and find its checkpoint.

    Args:
        unfinished: accept a run that is still going on or was stopped.

    Raises:
        UserError: a file is missing, the run is not finished, or it names no data set to be compared on.
    """
    remedy = "train it to its end (train_net.py with --resume goes on where it stopped)"
    for file_name in ("config.yaml", "metrics.json"):
        if not (folder / file_name).is_file():
            raise UserError(f"{folder} has no {file_name}, so it is no output folder of a finished run; {remedy}.")
    checkpoint, finished = _find_checkpoint(folder)
    if not finished and not unfinished:
        raise UserError(
            f"{folder} has no {FINAL} as its last checkpoint, so the run is not finished; {remedy}, or compare it as "
            "it stands with --unfinished."
        )
    cfg = read_config(str(folder / "config.yaml"), (), source=str(folder / "config.yaml"))
    if not cfg.DATASETS.TEST:
        raise UserError(f"{folder / 'config.yaml'} names no data set in DATASETS.TEST; a comparison needs one.")
    return Run(folder, cfg, read_curves(folder / "metrics.json"), checkpoint, finished)


def _find_checkpoint(folder: Path) -> tuple[Path | None, bool]:
    """The last checkpoint, and whether it is the final one."""
    final, pointer = folder / FINAL, folder / "last_checkpoint"
    # A folder that was copied for its results may lack the pointer.
    name = pointer.read_text().strip() if pointer.is_file() else FINAL
    if name == FINAL and final.is_file():
        return final, True
    last = folder / name
    return (last if last.is_file() else None), False


def read_curves(path: Path) -> Curves:
    """The scalars of a metrics.json; where a resumed run repeated an iteration, the later value counts."""
    curves: Curves = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            scalars = json.loads(line)
            iteration = scalars.pop("iteration")
        except (ValueError, KeyError, AttributeError):  # a killed run may leave half a line
            continue
        for name, value in scalars.items():
            curves[name][iteration] = value
    return dict(curves)


def common_test_set(runs: list[Run], wanted: str = "") -> str:
    """The data set on which all runs were evaluated: the wanted one, else the first of the first run.

    Raises:
        UserError: a run was not evaluated on it, or by other rules or on other files than the first.
    """
    test_set = wanted or runs[0].cfg.DATASETS.TEST[0]
    for run in runs:
        if test_set not in run.cfg.DATASETS.TEST:
            raise UserError(
                f"{run.folder} was evaluated on {', '.join(run.cfg.DATASETS.TEST)}, not on {test_set}; compare runs "
                "of one data set, which --test-set chooses where they have several."
            )
        if run.finished and "AP" not in run.metrics(test_set):
            raise UserError(
                f"{run.folder / 'metrics.json'} holds no bbox/AP on {test_set}, so the run was not evaluated; "
                "train_net.py with --resume evaluates a finished run."
            )
        for what, ours, theirs in zip(
            ("DATASETS row", "TEST.VOC_CONVENTION"), _evaluation(run, test_set), _evaluation(runs[0], test_set)
        ):
            if ours != theirs:
                raise UserError(
                    f"The {what} of {test_set} is {ours} in {run.folder} and {theirs} in {runs[0].folder}; numbers "
                    "from different data or rules cannot be compared."
                )
    return test_set


def _evaluation(run: Run, test_set: str) -> tuple:
    """The rows that declare the data set, none if it is builtin, and the rules of Pascal VOC where they count."""
    coco, voc = ([row for row in run.cfg.DATASETS[key] if row[0] == test_set] for key in ("COCO", "VOC"))
    return coco + voc, run.cfg.TEST.VOC_CONVENTION if voc else ""

"""Evaluates a teacher on the user's data, as it is and with the images prepared otherwise."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from ...data.classes import dataset_classes
from ...data.subset import spread_subset
from ...engine.trainer import Trainer
from ...teacher import Teacher
from .findings import Findings
from .preparations import TeacherDetector, other_preparations
from .verdict import judge

Detect = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
SURE = 0.5  # score of a sure detection


def check_teacher(
    cfg: CfgNode,
    teacher: Teacher,
    data_set: str,
    *,
    images: int,
    probe: int,
    student: nn.Module | None = None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate a teacher on evenly spread images of a registered data set of the student.

    Args:
        cfg: the student's config, or the teacher's own.
        probe: of these images, so many are also prepared otherwise, see :func:`other_preparations`; 0 for none.
        student: a detector in eval mode to compare with.

    Returns:
        The numbers, which can be written as JSON: AP, AP50, AP75 in percent, the rest as shares. "verdict" and
        "reasons" are those of :func:`judge`.
    """
    detector, names = TeacherDetector(cfg, teacher), dataset_classes(cfg)
    with tempfile.TemporaryDirectory() as folder, spread_subset(data_set, images) as subset:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder  # evaluators write there
        records = DatasetCatalog.get(subset)
        findings = Findings(records, len(names))
        metrics = _evaluate(cfg, subset, detector, "teacher", progress, findings)
        report = {
            "data_set": data_set,
            "images": len(records),
            **{name: metrics[name] for name in ("AP", "AP50", "AP75")},
            "lacks": list(teacher.lacks),
            "classes": _of_classes(names, metrics, findings),
            "images_with_objects": findings.images(),
            "nothing_found_in": findings.without_any(),
            "mean_score_of_right": findings.mean_score(),
            "precision_of_sure": findings.precision(SURE),
        }
        if probe:
            report["probe"] = _probe(cfg, subset, detector, findings, probe, progress)
        if student is not None:
            metrics = _evaluate(cfg, subset, student, "student", progress)
            report["student"] = {name: metrics[name] for name in ("AP", "AP50", "AP75")}
    report["verdict"], report["reasons"] = judge(report)
    return report


def _of_classes(names: Sequence[str], metrics: dict[str, float], findings: Findings) -> list[dict[str, Any]]:
    rows = []
    for index, (name, objects, found) in enumerate(zip(names, findings.objects(), findings.found())):
        rows.append({
            "name": name,
            "objects": objects,
            # Evaluators leave it out where there is one class only.
            "AP": metrics.get(f"AP-{name}", metrics["AP"]),
            "recall": found / objects if objects else math.nan,
            "mean_score_of_right": findings.mean_score(index),
        })
    return rows


def _probe(
    cfg: CfgNode,
    subset: str,
    detector: TeacherDetector,
    findings: Findings,
    count: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    with spread_subset(subset, count) as probe:
        records = DatasetCatalog.get(probe)
        as_it_is = findings.ap50({record["image_id"] for record in records})
        rows = []
        for preparation in other_preparations(cfg, detector.teacher):
            found = Findings(records, findings.num_classes)
            for inputs in _inputs(preparation.cfg or cfg, probe, preparation.name, progress):
                found.process(inputs, detector(inputs, preparation))
            rows.append({"name": preparation.name, "AP50": found.ap50(), "remedy": preparation.remedy})
        return {"images": len(records), "AP50": as_it_is, "prepared_otherwise": rows}


@torch.no_grad()
def _evaluate(
    cfg: CfgNode, data_set: str, detect: Detect, title: str, progress: Callable[[str], None], *others: Findings
) -> dict[str, float]:
    """The metrics of the project's evaluator; nan where it has none."""
    with _quiet():
        evaluator = Trainer.build_evaluator(cfg, data_set)
    evaluators = [evaluator, *others]
    for each in evaluators:
        each.reset()
    for inputs in _inputs(cfg, data_set, title, progress):
        outputs = detect(inputs)
        for each in evaluators:
            each.process(inputs, outputs)
    with _quiet():
        results = evaluator.evaluate()
    metrics = dict.fromkeys(("AP", "AP50", "AP75"), math.nan)
    metrics.update((results or {}).get("bbox", {}))
    return metrics


def _inputs(cfg: CfgNode, data_set: str, title: str, progress: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    loader = Trainer.build_test_loader(cfg, data_set)
    for number, inputs in zip(itertools.count(1), loader):
        progress(f"{title}: image {number} of {len(loader)}")
        yield inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Evaluators print what the report says better."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

"""Whether a teacher is good enough to teach: how it does on the user's data, and whether it sees them rightly."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import tempfile
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from torch import nn

from .. import class_mapping
from ..data.classes import dataset_classes
from ..data.subset import spread_subset
from ..engine.trainer import Trainer
from ..errors import UserError
from ..teacher import Teacher
from .findings import Findings

Progress = Callable[[str], None]
Detect = Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]

LEVELS = BAD, DOUBTFUL, GOOD = "not good enough", "doubtful", "good enough"

# Rules of thumb, explained in docs/teachers.md; AP and AP50 in percent.
BAD_AP50, DOUBTFUL_AP50 = 20.0, 40.0
STUDENT_MARGIN = 2.0  # AP by which a student may be better on a sample before the teacher is of no use
ENOUGH_OBJECTS, ENOUGH_OF_CLASS = 50, 5  # below, a sample says little
DOUBTFUL_RECALL = 0.5
DOUBTFUL_SHARE = 0.1  # of images with objects of which none is found
DOUBTFUL_SCORE = 0.2  # mean of right detections
DOUBTFUL_GAIN, BAD_GAIN = 5.0, 20.0  # of AP50, with the images prepared otherwise
SURE = 0.5

# In the order of BGR.
STATISTICS = {
    "caffe's statistics": ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "ImageNet's statistics": ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
    "pixels from 0 to 1": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
}


@dataclass(frozen=True)
class Preparation:
    """Another way to prepare the images, which would do better if the teacher's config were wrong.

    Attributes:
        name: what is other.
        remedy: what to do if it is better.
        swap: exchange red and blue.
        statistics: mean and standard deviation of each channel, in the teacher's order.
        cfg: whose INPUT sizes are taken.
    """

    name: str
    remedy: str
    swap: bool = False
    statistics: Optional[Tuple[Sequence[float], Sequence[float]]] = None
    cfg: Optional[CfgNode] = None


def other_preparations(cfg: CfgNode, teacher: Teacher) -> List[Preparation]:
    """Those that differ from what the student's config and the teacher's say."""
    found = [Preparation("with red and blue exchanged", "correct INPUT.FORMAT of the teacher's config", swap=True)]
    own = tuple(_values(getattr(teacher.model, name)) for name in ("pixel_mean", "pixel_std"))
    for name, pair in STATISTICS.items():
        statistics = tuple(tuple(values[::-1] if teacher.input_format == "RGB" else values) for values in pair)
        if not torch.allclose(torch.tensor(own), torch.tensor(statistics), rtol=0.02):
            remedy = "correct MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of the teacher's config"
            found.append(Preparation(f"with {name}", remedy, statistics=statistics))
    theirs = teacher.cfg.INPUT
    sizes = [(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST) for node in (cfg.INPUT, theirs)]
    if sizes[0] != sizes[1]:
        remedy = (
            f"train the student on images of another size (INPUT.MIN_SIZE_TRAIN; the teacher's own are {sizes[1][0]}, "
            f"the student's {sizes[0][0]}), or take a teacher of the student's size"
        )
        resized = cfg.clone()
        resized.defrost()
        resized.INPUT.MIN_SIZE_TEST, resized.INPUT.MAX_SIZE_TEST = sizes[1]
        found.append(Preparation("in the size of the teacher's config", remedy, cfg=resized))
    return found


class TeacherDetector:
    """A teacher that detects the student's classes in the student's images, as it sees them in a distillation.

    Raises:
        UserError: the class names of student or teacher are not known, and their numbers differ.
    """

    def __init__(self, cfg: CfgNode, teacher: Teacher) -> None:
        self.teacher = teacher
        self.student_format = cfg.INPUT.FORMAT
        ours, theirs = dataset_classes(cfg), list(teacher.classes)
        if ours and theirs:
            aliases = () if ours == theirs else cfg.MODEL.DISTILL.TEACHER.CLASS_ALIASES
            sources = class_mapping.match_classes(ours, theirs, aliases)
        elif len(ours) == teacher.staged.num_classes:
            sources = list(range(len(ours)))
        else:
            raise UserError(
                f"The data has {len(ours)} classes and the teacher {teacher.staged.num_classes}, whose names are not "
                "known; name them in DATASETS.CLASSES of the teacher's config, such as by MODEL.DISTILL.TEACHER.OPTS."
            )
        # Index -1 is a class of which the student knows nothing.
        self._index = torch.full((teacher.staged.num_classes,), -1)
        for ours_index, source in enumerate(sources):
            if source is not None:
                self._index[source] = ours_index

    @torch.no_grad()
    def __call__(
        self, inputs: Sequence[Dict[str, Any]], preparation: Optional[Preparation] = None
    ) -> List[Dict[str, Any]]:
        """Each image's ``instances`` on the CPU, boxes only, with the student's classes."""
        inputs = self.teacher.in_own_format(inputs, self.student_format)
        if preparation is not None:
            inputs = [{**x, "image": self._prepared(x["image"], preparation)} for x in inputs]
        return [{"instances": self._of_student(output["instances"])} for output in self.teacher.model(inputs)]

    def _prepared(self, image: torch.Tensor, preparation: Preparation) -> torch.Tensor:
        if preparation.swap:
            image = image.flip(0)
        if preparation.statistics is not None:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in preparation.statistics)
            model = self.teacher.model
            own_mean, own_std = (x.cpu().view(3, 1, 1) for x in (model.pixel_mean, model.pixel_std))
            image = (image - mean) / std * own_std + own_mean  # what the model then makes (image - mean) / std
        return image

    def _of_student(self, found: Instances) -> Instances:
        found = found.to("cpu")
        classes = self._index[found.pred_classes]
        result = Instances(
            found.image_size, pred_boxes=found.pred_boxes, scores=found.scores, pred_classes=classes
        )
        return result[classes >= 0]


def check_teacher(
    cfg: CfgNode,
    teacher: Teacher,
    data_set: str,
    *,
    images: int,
    probe: int,
    student: Optional[nn.Module] = None,
    progress: Progress,
) -> Dict[str, Any]:
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


def judge(report: Dict[str, Any]) -> Tuple[str, List[str]]:
    """The verdict on the numbers of :func:`check_teacher`, and what speaks against the teacher, the worst first."""
    faults = sorted(_faults(report), key=lambda fault: LEVELS.index(fault[0]))
    return faults[0][0] if faults else GOOD, [reason for _, reason in faults]


def _faults(report: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    ap50 = 0.0 if math.isnan(report["AP50"]) else report["AP50"]
    probe = report.get("probe", {})
    if probe.get("prepared_otherwise"):
        best = max(probe["prepared_otherwise"], key=lambda preparation: preparation["AP50"])
        gain = best["AP50"] - probe["AP50"]
        if gain > DOUBTFUL_GAIN:
            yield BAD if gain > BAD_GAIN else DOUBTFUL, (
                f"on {probe['images']} images its AP50 is {gain:.1f} higher {best['name']}: {best['remedy']}"
            )
    if ap50 < BAD_AP50:
        yield BAD, f"its AP50 is {ap50:.1f}, below {BAD_AP50:.0f}: train it longer or on this data, or take another"
    elif ap50 < DOUBTFUL_AP50:
        yield DOUBTFUL, f"its AP50 is {ap50:.1f}, below {DOUBTFUL_AP50:.0f}: a better one would teach more"
    if "student" in report:
        lead = report["student"]["AP"] - report["AP"]
        if lead > 0:
            level = BAD if lead > STUDENT_MARGIN else DOUBTFUL
            yield level, f"the student's AP is {lead:.1f} higher without it: train the teacher longer, or make it larger"
    yield from _class_faults(report)
    share = len(report["nothing_found_in"]) / max(report["images_with_objects"], 1)
    if share > DOUBTFUL_SHARE:
        yield DOUBTFUL, f"it finds nothing in {share:.0%} of the images with objects: look at these images"
    if report["mean_score_of_right"] < DOUBTFUL_SCORE:
        yield DOUBTFUL, (
            f"the mean score of its right detections is {report['mean_score_of_right']:.2f}: terms that are weighted "
            "by it will be weak, so raise their weights, or train it longer"
        )
    total = sum(row["objects"] for row in report["classes"])
    if total < ENOUGH_OBJECTS:
        yield DOUBTFUL, f"{total} objects are too few to tell: take more images"


def _class_faults(report: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    if report["lacks"]:
        yield DOUBTFUL, (
            f"it does not know {_some(report['lacks'])}, which counts as AP 0, and methods that compare classes cannot "
            f"use it: name them in {class_mapping.KEY} if it has them under other names"
        )
    rows = [row for row in report["classes"] if row["name"] not in report["lacks"]]
    rows = [row for row in rows if row["objects"] >= ENOUGH_OF_CLASS]
    never = [row["name"] for row in rows if row["recall"] == 0]
    if never:
        yield BAD, f"it never finds {_some(never)}: train it on them"
    seldom = [f"{row['name']} ({row['recall']:.0%})" for row in rows if 0 < row["recall"] < DOUBTFUL_RECALL]
    if seldom:
        yield DOUBTFUL, f"it finds less than half of the objects of {_some(seldom)}: train it longer"


def _some(names: Sequence[str]) -> str:
    return class_mapping.listed(names, limit=5)


def _of_classes(names: Sequence[str], metrics: Dict[str, float], findings: Findings) -> List[Dict[str, Any]]:
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
    cfg: CfgNode, subset: str, detector: TeacherDetector, findings: Findings, count: int, progress: Progress
) -> Dict[str, Any]:
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
    cfg: CfgNode, data_set: str, detect: Detect, title: str, progress: Progress, *others: Findings
) -> Dict[str, float]:
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


def _inputs(cfg: CfgNode, data_set: str, title: str, progress: Progress) -> Iterator[List[Dict[str, Any]]]:
    loader = Trainer.build_test_loader(cfg, data_set)
    for number, inputs in zip(itertools.count(1), loader):
        progress(f"{title}: image {number} of {len(loader)}")
        yield inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Evaluators print what the report says better."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _values(x: torch.Tensor) -> Tuple[float, ...]:
    return tuple(x.flatten().tolist())

"""Whether a teacher is good enough to teach, by the numbers of its check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...config.class_names import ALIASES_KEY, listed

LEVELS = BAD, DOUBTFUL, GOOD = "not good enough", "doubtful", "good enough"

# Rules of thumb, explained in docs/teachers.md; AP and AP50 in percent.
BAD_AP50, DOUBTFUL_AP50 = 20.0, 40.0
STUDENT_MARGIN = 2.0  # AP by which a student may be better on a sample before the teacher is of no use
ENOUGH_OBJECTS, ENOUGH_OF_CLASS = 50, 5  # below, a sample says little
DOUBTFUL_RECALL = 0.5
DOUBTFUL_SHARE = 0.1  # of images with objects of which none is found
DOUBTFUL_SCORE = 0.2  # mean of right detections
DOUBTFUL_GAIN, BAD_GAIN = 5.0, 20.0  # of AP50, with the images prepared otherwise


def judge(report: dict[str, Any]) -> tuple[str, list[str]]:
    """The verdict on the numbers of :func:`check_teacher`, and what speaks against the teacher, the worst first."""
    faults = sorted(_faults(report), key=lambda fault: LEVELS.index(fault[0]))
    return faults[0][0] if faults else GOOD, [reason for _, reason in faults]


def _faults(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
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


def _class_faults(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if report["lacks"]:
        yield DOUBTFUL, (
            f"it does not know {_some(report['lacks'])}, which counts as AP 0, and methods that compare classes cannot "
            f"use it: name them in {ALIASES_KEY} if it has them under other names"
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
    return listed(names, limit=5)

"""What is found of the objects, other preparations of the images, and the verdict."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from d2_distill.apps.teacher_check.findings import Findings
from d2_distill.apps.teacher_check.preparations import TeacherDetector, other_preparations
from d2_distill.apps.teacher_check.verdict import BAD, DOUBTFUL, GOOD, judge
from d2_distill.errors import UserError
from d2_distill.teacher import Teacher

from ...same_detections import assert_same_detections
from ...small_detectors import batch, build, detector_cfg

PLACES = [[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]]


def record(image_id, *objects):
    """Objects are (place, class), with "crowd" behind those that are one."""
    annotations = [
        {"bbox": PLACES[place], "bbox_mode": BoxMode.XYXY_ABS, "category_id": k, "iscrowd": int(bool(crowd))}
        for place, k, *crowd in objects
    ]
    return {"image_id": image_id, "file_name": f"{image_id}.png", "height": 20, "width": 60, "annotations": annotations}


def detections(*rows):
    """Rows of (place, class, score)."""
    found = Instances((20, 60))
    found.pred_boxes = Boxes(torch.tensor([PLACES[place] for place, _, _ in rows]).reshape(-1, 4))
    found.pred_classes = torch.tensor([k for _, k, _ in rows], dtype=torch.int64)
    found.scores = torch.tensor([score for _, _, score in rows])
    return {"instances": found}


@pytest.fixture
def findings():
    """Three classes in four images, the last of which is empty."""
    records = [
        record("a", (0, 0), (1, 1), (2, 1)), record("b", (0, 0)), record("c", (0, 1), (1, 0, "crowd")), record("d")
    ]
    found = Findings(records, 3)
    outputs = [
        detections((0, 0, 0.9), (0, 0, 0.8), (1, 1, 0.6), (2, 0, 0.5)), detections((0, 0, 0.7)), detections(),
        detections((0, 2, 0.3)),
    ]
    for each, output in zip(records, outputs):
        found.process([each], [output])
    return found


def test_findings(findings):
    assert findings.objects() == [2, 3, 0] and findings.found() == [2, 1, 0]
    assert findings.mean_score() == pytest.approx((0.9 + 0.6 + 0.7) / 3)
    assert findings.mean_score(0) == pytest.approx(0.8) and math.isnan(findings.mean_score(2))
    assert findings.precision(0.5) == pytest.approx(3 / 5)
    assert findings.images() == 3 and findings.without_any() == ["c.png"]
    # Class 0: right, wrong, right, wrong; class 1: one of three. Class 2 has no object.
    assert findings.ap50() == pytest.approx(100 * ((0.5 + 0.5 * 2 / 3) + 1 / 3) / 2)
    assert findings.ap50({"b"}) == pytest.approx(100) and math.isnan(findings.ap50({"d"}))


CFG = {"PIXEL_STD": [57.375, 57.12, 58.395]}


def detector(input_format="BGR", classes=(), lacks=(), ours=("a", "b", "c"), **overrides):
    """A teacher of a student with the classes, and the student's config."""
    cfg = detector_cfg("FCOS", **{**CFG, **overrides})
    teacher = Teacher(build(cfg, salt=1), input_format=input_format, classes=classes, lacks=lacks, cfg=cfg)
    student_cfg = detector_cfg("FCOS", **CFG)
    student_cfg.DATASETS.CLASSES = tuple(ours)
    return TeacherDetector(student_cfg, teacher), student_cfg


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs):
        assert_same_detections(mine["instances"], other["instances"])


def named(detector, cfg, part):
    [found] = [p for p in other_preparations(cfg, detector.teacher) if part in p.name]
    return found


def test_images_are_prepared_otherwise():
    """With each preparation a wrong config does what the right one would."""
    right, cfg = detector()
    assert_same(right(batch()), right.teacher.model(batch()))
    wrong, _ = detector(input_format="RGB")
    assert_same(wrong(batch(), named(wrong, cfg, "red and blue")), right(batch()))
    caffe, _ = detector(PIXEL_STD=[1.0, 1.0, 1.0])
    assert_same(caffe(batch(), named(caffe, cfg, "ImageNet's")), right(batch()))
    names = [p.name for p in other_preparations(cfg, right.teacher)]
    assert names == ["with red and blue exchanged", "with caffe's statistics", "with pixels from 0 to 1"]
    rgb = {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}
    openmmlab, _ = detector(input_format="RGB", **rgb)
    assert [p.name for p in other_preparations(cfg, openmmlab.teacher)] == names


def test_size_of_the_teacher():
    teacher, cfg = detector()
    teacher.teacher.cfg.INPUT.MIN_SIZE_TEST = 100
    found = named(teacher, cfg, "size")
    assert found.cfg.INPUT.MIN_SIZE_TEST == 100 and "teacher's own are 100, the student's 800" in found.remedy


def test_classes_that_only_one_side_has():
    whole, _ = detector()
    other, _ = detector(classes=("x", "C", "a"), lacks=("b",))
    for mine, theirs in zip(other(batch()), whole(batch())):
        mine, theirs = mine["instances"], theirs["instances"]
        kept = theirs[theirs.pred_classes > 0]
        assert 0 < len(kept) < len(theirs) and torch.equal(mine.scores, kept.scores)
        assert mine.pred_classes.tolist() == [{1: 2, 2: 0}[k] for k in kept.pred_classes.tolist()]
    with pytest.raises(UserError, match="The data has 2 classes and the teacher 3, whose names are not known"):
        detector(ours=("a", "b"))


REPORT = {
    "AP": 40.0, "AP50": 60.0, "AP75": 42.0, "lacks": [], "images_with_objects": 50, "nothing_found_in": [],
    "mean_score_of_right": 0.5,
    "classes": [{"name": "cat", "objects": 60, "recall": 0.9}, {"name": "dog", "objects": 4, "recall": 0.0}],
}


@pytest.mark.parametrize(
    "change, verdict, reasons",
    [
        ({}, GOOD, []),
        ({"AP50": 30.0}, DOUBTFUL, ["its AP50 is 30.0, below 40"]),
        ({"AP50": 10.0}, BAD, ["its AP50 is 10.0, below 20"]),
        ({"AP50": math.nan}, BAD, ["its AP50 is 0.0, below 20"]),
        ({"student": {"AP": 39.0}}, GOOD, []),
        ({"student": {"AP": 41.0}}, DOUBTFUL, ["the student's AP is 1.0 higher without it"]),
        ({"student": {"AP": 43.0}}, BAD, ["the student's AP is 3.0 higher without it"]),
        ({"lacks": ["dog"]}, DOUBTFUL, ["it does not know dog"]),
        ({"classes": [{"name": "dog", "objects": 50, "recall": 0.0}]}, BAD, ["it never finds dog"]),
        (
            {"classes": [{"name": "dog", "objects": 50, "recall": 0.4}]}, DOUBTFUL,
            [r"less than half of the objects of dog \(40%\)"],
        ),
        ({"nothing_found_in": ["x"] * 10}, DOUBTFUL, ["it finds nothing in 20% of the images"]),
        ({"mean_score_of_right": 0.1}, DOUBTFUL, ["mean score of its right detections is 0.10"]),
        ({"classes": []}, DOUBTFUL, ["0 objects are too few"]),
        ({"AP50": 10.0, "lacks": ["dog"]}, BAD, ["its AP50 is 10.0", "it does not know dog"]),
    ],
)
def test_verdict(change, verdict, reasons):
    found, why = judge({**copy.deepcopy(REPORT), **change})
    assert found == verdict and len(why) == len(reasons)
    assert all(re.search(pattern, text) for pattern, text in zip(reasons, why))


@pytest.mark.parametrize("gain, verdict", [(4.0, GOOD), (6.0, DOUBTFUL), (25.0, BAD)])
def test_images_that_are_better_prepared_otherwise(gain, verdict):
    other = [{"name": "with x", "AP50": 0.0, "remedy": "y"}, {"name": "with z", "AP50": 50.0 + gain, "remedy": "mend"}]
    found, reasons = judge({**REPORT, "probe": {"images": 20, "AP50": 50.0, "prepared_otherwise": other}})
    assert found == verdict
    assert reasons == ([] if verdict == GOOD else [f"on 20 images its AP50 is {gain:.1f} higher with z: mend"])

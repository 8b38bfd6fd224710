"""Detections that are on objects, and those that are not."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

from d2_distill.evaluation.matching import match_detections


def instances(boxes, classes, scores=None):
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    classes = torch.tensor(classes, dtype=torch.int64)
    if scores is None:
        return Instances((40, 40), gt_boxes=boxes, gt_classes=classes)
    return Instances((40, 40), pred_boxes=boxes, pred_classes=classes, scores=torch.tensor(scores, dtype=torch.float32))


A, B, AWAY = [0.0, 0, 10, 10], [20.0, 20, 30, 30], [8.0, 8, 18, 18]


def test_right_means_class_and_place_and_once():
    truth = instances([A, B], [1, 2])
    found = instances([A, B, AWAY, A], [1, 1, 1, 1], [0.5, 0.9, 0.9, 0.8])
    match = match_detections(found, truth)
    assert match.right.tolist() == [False, False, False, True]  # the surest on A; the other doubles it
    assert match.missed.tolist() == [False, True] and match.errors == 4
    assert match_detections(instances([A, B], [1, 2], [0.5, 0.4]), truth).errors == 0


def test_nothing_found_and_nothing_there():
    assert match_detections(instances([], [], []), instances([A], [1])).errors == 1
    assert match_detections(instances([A], [1], [0.5]), instances([], [])).errors == 1
    assert match_detections(instances([], [], []), instances([], [])).errors == 0

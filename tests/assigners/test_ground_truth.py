"""Padding of a batch's ground truth, and the targets that matches stand for."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_distill.assigners import BACKGROUND, IGNORED, GroundTruth, Match

BOXES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 8.0, 8.0], [5.0, 5.0, 6.0, 9.0]])


def _instances(boxes, classes) -> Instances:
    instances = Instances((32, 32))
    instances.gt_boxes, instances.gt_classes = Boxes(boxes), torch.tensor(classes, dtype=torch.int64)
    return instances


@pytest.fixture
def truth() -> GroundTruth:
    return GroundTruth.from_instances([
        _instances(BOXES[:1], [4]), _instances(BOXES[:0], []), _instances(BOXES, [3, 0, 6])
    ])


def test_images_are_padded_to_the_fullest(truth):
    assert truth.boxes.shape == (3, 3, 4) and truth.classes.dtype == torch.int64
    assert truth.valid.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert torch.equal(truth.boxes[2], BOXES) and truth.classes[2].tolist() == [3, 0, 6]
    assert torch.equal(truth.boxes[0, 0], BOXES[0]) and truth.classes[0].tolist() == [4, 0, 0]
    assert not truth.boxes[0, 1:].any() and not truth.boxes[1].any()


def test_matches_become_labels_and_boxes(truth):
    matches = torch.tensor([[0, BACKGROUND], [BACKGROUND, BACKGROUND], [2, 1]])
    assignment = truth.assignment(Match(matches), num_classes=7)
    assert assignment.labels.tolist() == [[4, 7], [7, 7], [6, 0]]
    expected = torch.stack([BOXES[0], *torch.zeros(3, 4), BOXES[2], BOXES[1]]).view(3, 2, 4)
    assert torch.equal(assignment.boxes, expected)
    assert assignment.foreground.tolist() == [[True, False], [False, False], [True, True]]


def test_ignored_and_invalid_anchors_have_no_label(truth):
    matches = torch.tensor([[0, IGNORED], [BACKGROUND, IGNORED], [2, 1]])
    valid = torch.tensor([[True, True], [False, True], [True, False]])
    assignment = truth.assignment(Match(matches), 7, valid)
    assert assignment.labels.tolist() == [[4, -1], [-1, -1], [6, -1]]
    assert not assignment.boxes[0, 1].any()
    assert truth.assignment(Match(matches), 7, valid[2]).labels.tolist() == [[4, -1], [7, -1], [6, -1]]


def test_a_batch_without_any_box():
    truth = GroundTruth.from_instances([_instances(BOXES[:0], []), _instances(BOXES[:0], [])])
    assert truth.boxes.shape == (2, 0, 4) and truth.valid.shape == (2, 0)
    assignment = truth.assignment(Match(torch.tensor([[BACKGROUND] * 5, [BACKGROUND] * 4 + [IGNORED]])), 7)
    assert assignment.labels.tolist() == [[7] * 5, [7] * 4 + [-1]]
    assert assignment.boxes.shape == (2, 5, 4) and not assignment.boxes.any()


def test_what_the_assigner_found_besides_is_passed_on(truth):
    matches, scores, thresholds = torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2), torch.rand(3, 3)
    assignment = truth.assignment(Match(matches, scores, thresholds), 7)
    assert assignment.scores is scores and assignment.thresholds is thresholds
    assert torch.equal(torch.stack(assignment.positives), assignment.foreground.nonzero().T)

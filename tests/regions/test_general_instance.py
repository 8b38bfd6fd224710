"""General instances against a greedy loop over rows."""

from __future__ import annotations

import pytest
import torch

from d2_distill.regions import general_instance_rows

from ..assigners.scenes import slow_iou


def _predictions(seed, num_rows, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(num_rows, num_classes, generator=generator) for _ in range(2)]
    boxes = []
    for _ in range(2):
        corner = torch.rand(num_rows, 2, generator=generator) * 40
        boxes.append(torch.cat([corner, corner + 1 + 15 * torch.rand(num_rows, 2, generator=generator)], 1))
    return (*scores, *boxes)


def _slow_rows(student_scores, teacher_scores, student_boxes, teacher_boxes, nms_thresh, max_rows):
    rows = []
    for row, (student, teacher) in enumerate(zip(student_scores.tolist(), teacher_scores.tolist())):
        difference, teacher_higher = max((abs(t - s), t >= s) for s, t in zip(student, teacher))
        box = (teacher_boxes if teacher_higher else student_boxes)[row].tolist()
        rows.append((difference, row, box))
    kept = []
    for _, row, box in sorted(rows, reverse=True):
        if len(kept) < max_rows and all(slow_iou(box, other) <= nms_thresh for _, other in kept):
            kept.append((row, box))
    return [row for row, _ in kept]


@pytest.mark.parametrize("nms_thresh", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_matches_a_loop(num_rows, nms_thresh):
    for seed in range(3):
        predictions = _predictions(seed, num_rows)
        rows = general_instance_rows(*predictions, nms_thresh=nms_thresh, max_rows=10)
        assert rows.tolist() == _slow_rows(*predictions, nms_thresh, 10)


def test_rows_behind_the_first_considered_are_found():
    # The 3000 largest differences are all at the same place, the others of the ten are behind them.
    student_scores, teacher_scores, *boxes = _predictions(0, 3300)
    student_scores[:3000], teacher_scores[:3000] = 0.0, 1.0
    for of_detector in boxes:
        of_detector[:3000] = torch.tensor([90.0, 90.0, 95.0, 95.0])
    rows = general_instance_rows(student_scores, teacher_scores, *boxes).tolist()
    assert len(rows) == 10 and rows[0] < 3000 and min(rows[1:]) >= 3000
    assert rows[1:] == _slow_rows(student_scores, teacher_scores, *boxes, 0.3, 10)[1:]


def test_fewer_rows_than_asked_for_if_all_overlap():
    student, teacher, _, _ = _predictions(1, 50)
    boxes = [torch.tensor([0.0, 0.0, 5.0, 5.0]).expand(50, 4)] * 2
    rows = general_instance_rows(student, teacher, *boxes)
    assert rows.tolist() == [(teacher - student).abs().amax(dim=1).argmax().item()]


def test_the_box_is_of_the_detector_that_is_surer():
    # The teacher is surer of row 0, the student of row 1, and there both have the same box.
    student_scores = torch.tensor([[0.1, 0.0], [0.8, 0.0], [0.0, 0.3]])
    teacher_scores = torch.tensor([[1.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    near, far, other = [0.0, 0.0, 4.0, 4.0], [50.0, 50.0, 54.0, 54.0], [20.0, 20.0, 24.0, 24.0]
    student_boxes, teacher_boxes = torch.tensor([far, near, other]), torch.tensor([near, far, far])
    rows = general_instance_rows(student_scores, teacher_scores, student_boxes, teacher_boxes)
    assert rows.tolist() == [0, 2]
    # With the scores exchanged all three are at the place that the first row was not at.
    rows = general_instance_rows(teacher_scores, student_scores, student_boxes, teacher_boxes)
    assert rows.tolist() == [0]


def test_no_row_and_a_limit():
    empty = torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 4)
    assert general_instance_rows(*empty).shape == (0,)
    assert len(general_instance_rows(*_predictions(2, 100), max_rows=2)) == 2

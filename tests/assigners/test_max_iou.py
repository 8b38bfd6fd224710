"""MaxIoU assignment against a loop over anchors and boxes."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from d2_distill.assigners import BACKGROUND, IGNORED, match_max_iou
from d2_distill.assigners.max_iou import claimants

RULES = {"thresholds": (0.4, 0.5), "labels": (0, -1, 1)}


def _slow_claims(quality, matches):
    """One box after the other takes all anchors of its highest IoU; one that touches nothing takes none."""
    matches = list(matches)
    for index, row in enumerate(quality):
        for anchor, iou in enumerate(row):
            if iou == max(row) and iou > 0:
                matches[anchor] = index
    return matches


def _slow_matches(quality, num_anchors):
    matches = []
    for anchor in range(num_anchors):
        column = [row[anchor] for row in quality]
        best = max(column, default=0)
        matches.append(column.index(best) if best >= 0.5 else BACKGROUND if best < 0.4 else IGNORED)
    return _slow_claims(quality, matches)


@pytest.mark.parametrize("seed", range(6))
def test_claims_match_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/16 make ties frequent; many zeros make boxes that touch nothing.
    quality = torch.randint(0, 14, (3, 5, 30), generator=generator) / 16
    quality = quality * (torch.rand(3, 5, 30, generator=generator) > 0.5)
    quality[:, seed % 5] = 0
    claimed = claimants(quality, torch.arange(1, 6))
    for image in range(3):
        assert claimed[image].tolist() == [1 + box for box in _slow_claims(quality[image].tolist(), [-1] * 30)]
    assert claimed.dtype == torch.int64


@pytest.mark.parametrize("seed", range(8))
def test_matches_match_a_loop(seed):
    """A padded batch: every image as if it were alone; anchors that are not valid overlap nothing."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(60, 4, generator=generator, dtype=torch.float64) * 50
    anchors = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 2], dim=1)
    counts = [seed % 4, 5, 0]
    boxes = torch.zeros(3, 5, 4, dtype=torch.float64)
    valid_boxes = torch.zeros(3, 5, dtype=torch.bool)
    for image, count in enumerate(counts):
        # Near some anchor, so that there are IoUs of all sizes, and on an anchor exactly.
        boxes[image, :count] = anchors[torch.randperm(60, generator=generator)[:count]]
        boxes[image, 1:count] += torch.randn(max(count - 1, 0), 4, generator=generator)
        valid_boxes[image, :count] = True
    valid_anchors = torch.rand(3, 60, generator=generator) > 0.2 if seed % 2 else None
    matches = match_max_iou(anchors, boxes, valid_boxes, valid_anchors, **RULES)
    for image, count in enumerate(counts):
        quality = box_iou(boxes[image, :count], anchors)
        if valid_anchors is not None:
            quality = quality * valid_anchors[image]
        assert matches[image].tolist() == _slow_matches(quality.tolist(), 60)
    assert (matches[1] >= 0).any() and (matches[2] == BACKGROUND).all()


def _boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def _match(anchors, boxes):
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    return match_max_iou(anchors, boxes[None], valid, **RULES)[0].tolist()


def test_a_box_takes_its_best_anchor_from_another_box():
    anchors = _boxes([0, 0, 10, 10], [0, 0, 10, 6])
    boxes = _boxes([0, 0, 10, 10], [0, 3, 10, 5])
    # The second anchor overlaps the first box more (0.6), but the second box nothing more than it (1/3).
    assert _match(anchors, boxes) == [0, 1]


def test_the_last_box_wins_an_anchor_that_two_claim():
    anchor = _boxes([0, 0, 10, 10])
    assert _match(anchor, _boxes([0, 0, 10, 4], [0, 0, 10, 2], [0, 0, 3, 10])) == [2]


def test_a_box_that_touches_no_anchor_claims_none():
    anchors = _boxes([0, 0, 10, 10], [20, 0, 30, 10])
    assert _match(anchors, _boxes([0, 0, 10, 9], [50, 50, 60, 60])) == [0, BACKGROUND]


def test_between_the_thresholds():
    """Both are lower bounds of the next label; the anchor that fits exactly is claimed."""
    anchors = _boxes([0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 4.5], [0, 0, 10, 3.9])
    assert _match(anchors, _boxes([0, 0, 10, 10])) == [0, 0, IGNORED, IGNORED, BACKGROUND]


def test_boxes_without_area_claim_nothing():
    assert _match(_boxes([0, 0, 10, 10]), _boxes([5, 5, 5, 5], [0, 5, 10, 5])) == [BACKGROUND]


def test_no_box():
    valid = torch.zeros(2, 0, dtype=torch.bool)
    matches = match_max_iou(torch.rand(4, 4), torch.zeros(2, 0, 4), valid, **RULES)
    assert matches.tolist() == [[BACKGROUND] * 4] * 2

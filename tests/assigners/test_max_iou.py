"""MaxIoU assignment against a loop over anchors and boxes."""

from __future__ import annotations

import pytest
import torch

from d2_distill.assigners import MaxIoUMatcher, claim_best_anchors


def _matcher() -> MaxIoUMatcher:
    return MaxIoUMatcher([0.4, 0.5], [0, -1, 1])


def _slow_assignment(quality):
    """The reference's rules, one box after the other; a box that touches nothing claims nothing."""
    matches, labels = [], []
    for anchor in range(len(quality[0])):
        column = [row[anchor] for row in quality]
        best = column.index(max(column))
        matches.append(best)
        labels.append(1 if column[best] >= 0.5 else 0 if column[best] < 0.4 else -1)
    for gt, row in enumerate(quality):
        for anchor, iou in enumerate(row):
            if iou == max(row) and iou > 0:
                matches[anchor], labels[anchor] = gt, 1
    return matches, labels


@pytest.mark.parametrize("seed", range(6))
def test_matches_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/16 make ties frequent; many zeros make boxes that touch nothing.
    quality = torch.randint(0, 14, (5, 30), generator=generator) / 16
    quality = quality * (torch.rand(5, 30, generator=generator) > 0.5)
    quality[seed % 5] = 0
    matches, labels = _matcher()(quality)
    expected_matches, expected_labels = _slow_assignment(quality.tolist())
    assert labels.tolist() == expected_labels
    assert matches.tolist() == expected_matches


def test_a_box_takes_its_best_anchor_from_another_box():
    quality = torch.tensor([[0.9, 0.6], [0.0, 0.3]])
    matches, labels = _matcher()(quality)
    assert matches.tolist() == [0, 1] and labels.tolist() == [1, 1]


def test_the_last_box_wins_an_anchor_that_two_claim():
    matches, labels = _matcher()(torch.tensor([[0.45, 0.1], [0.2, 0.1], [0.3, 0.0]]))
    assert matches.tolist() == [2, 0] and labels.tolist() == [1, 0]


def test_a_box_that_touches_no_anchor_claims_none():
    matches, labels = _matcher()(torch.tensor([[0.0, 0.7, 0.0], [0.0, 0.0, 0.0]]))
    assert labels.tolist() == [0, 1, 0] and matches[1] == 0


def test_no_box_and_no_anchor():
    matches, labels = _matcher()(torch.zeros(0, 4))
    assert labels.tolist() == [0, 0, 0, 0] and matches.tolist() == [0, 0, 0, 0]
    matches, labels = claim_best_anchors(
        torch.zeros(3, 0), torch.zeros(0).long(), torch.zeros(0, dtype=torch.int8)
    )
    assert len(matches) == len(labels) == 0


def test_arguments_are_not_changed():
    quality, matches, labels = torch.rand(3, 8), torch.zeros(8).long(), torch.zeros(8, dtype=torch.int8)
    new_matches, new_labels = claim_best_anchors(quality, matches, labels)
    assert not matches.any() and not labels.any()
    assert new_labels.dtype == torch.int8 and new_matches.dtype == torch.int64 and new_labels.any()

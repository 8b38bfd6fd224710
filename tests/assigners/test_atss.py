"""ATSS against loops over images, boxes, levels and anchors."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from d2_distill.assigners import BACKGROUND, atss_thresholds, match_atss

from .scenes import SCENES, boxes_of, build, slow_iou, usable_anchors


def _distance(anchor, box):
    return math.hypot(anchor[0] + anchor[2] - box[0] - box[2], anchor[1] + anchor[3] - box[1] - box[3]) / 2


def _slow_candidates(scene, image, box, topk):
    usable, start, candidates = set(usable_anchors(scene, image)), 0, []
    anchors = scene.anchors.tolist()
    for size in scene.level_sizes:
        level = [i for i in range(start, start + size) if i in usable]
        candidates += sorted(level, key=lambda i: _distance(anchors[i], box))[:topk]
        start += size
    return candidates


def _slow_atss(scene, image, topk):
    anchors = scene.anchors.tolist()
    matches, thresholds = [BACKGROUND] * len(anchors), []
    best = [-1.0] * len(anchors)
    for index, box in enumerate(boxes_of(scene, image)):
        candidates = _slow_candidates(scene, image, box, topk)
        overlaps = [slow_iou(anchors[i], box) for i in candidates]
        spread = statistics.stdev(overlaps) if len(overlaps) > 1 else 0
        thresholds.append(statistics.fmean(overlaps) + spread if overlaps else 0)
        for i, overlap in zip(candidates, overlaps):
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = min(x - box[0], box[2] - x, y - box[1], box[3] - y) > 0.01
            if inside and overlap >= thresholds[-1] and overlap > best[i]:
                matches[i], best[i] = index, overlap
    return matches, thresholds


@pytest.mark.parametrize("topk", [1, 9, 50])
@pytest.mark.parametrize("name", SCENES)
def test_matches_loops(name, topk):
    scene = build(**SCENES[name])
    match = match_atss(
        scene.anchors, scene.level_sizes, scene.gt.boxes, scene.gt.valid, scene.valid_anchors, topk=topk
    )
    assert match.matches.dtype == torch.int64 and match.matches.shape == (4, len(scene.anchors))
    assert match.thresholds.shape == scene.gt.valid.shape and match.thresholds.isfinite().all()
    for image in range(len(match.matches)):
        matches, thresholds = _slow_atss(scene, image, topk)
        assert match.matches[image].tolist() == matches
        assert match.thresholds[image, scene.gt.valid[image]].tolist() == pytest.approx(thresholds, abs=1e-12)
    assert (match.matches >= 0).any() == scene.gt.valid.any()
    alone = atss_thresholds(scene.anchors, scene.level_sizes, scene.gt.boxes, scene.valid_anchors, topk=topk)
    assert torch.equal(alone, match.thresholds)


def test_an_anchor_of_equal_boxes_goes_to_the_first():
    scene = build(0)
    match = match_atss(scene.anchors, scene.level_sizes, scene.gt.boxes, scene.gt.valid).matches[2]
    assert (scene.gt.boxes[2, 3] == scene.gt.boxes[2, 4]).all()
    assert (match == 3).any() and not (match == 4).any()


def test_a_single_candidate_is_its_own_threshold():
    anchors, box = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[[1.0, 1.0, 9.0, 9.0]]])
    match = match_atss(anchors, [1], box, torch.ones(1, 1, dtype=torch.bool))
    assert match.matches.tolist() == [[0]]
    assert match.thresholds.item() == pytest.approx(49 / 79)


def test_a_box_beside_all_anchors_and_one_without_a_size_get_none():
    scene = build(0)
    match = match_atss(scene.anchors, scene.level_sizes, scene.gt.boxes, scene.gt.valid).matches[2]
    assert not torch.isin(match, torch.tensor([1, 2])).any()


def test_padding_and_the_other_images_change_nothing():
    scene = build(seed=1, counts=(1, 3, 6, 9), some_invalid=True)
    whole = match_atss(
        scene.anchors, scene.level_sizes, scene.gt.boxes, scene.gt.valid, scene.valid_anchors
    )
    for image, count in enumerate((1, 3, 6, 9)):
        alone = match_atss(
            scene.anchors,
            scene.level_sizes,
            scene.gt.boxes[image : image + 1, :count],
            scene.gt.valid[image : image + 1, :count],
            scene.valid_anchors[image : image + 1],
        )
        assert torch.equal(alone.matches[0], whole.matches[image])
        assert torch.equal(alone.thresholds[0], whole.thresholds[image, :count])


def test_single_precision_on_a_large_image_picks_the_nearest_anchors():
    # 1e4 pixels off the origin, squares of coordinates leave no digits for distances of a few pixels.
    centers = torch.arange(40.0) * 0.25 + 1e4
    anchors = torch.stack([centers - 4, centers - 4, centers + 4, centers + 4], dim=1)
    box = anchors[None, 17:18].clone()
    match = match_atss(anchors, [40], box, torch.ones(1, 1, dtype=torch.bool), topk=1)
    assert (match.matches == 0).nonzero().tolist() == [[0, 17]]

"""Task-aligned assignment against loops over images, boxes and anchors."""

from __future__ import annotations

import pytest
import torch

from d2_distill.assigners import BACKGROUND, match_task_aligned

from .scenes import SCENES, Scene, boxes_of, build, slow_iou, usable_anchors

NUM_CLASSES = 7


def _predictions(scene: Scene, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N, R, K), and boxes (N, R, 4) between the anchors and one of the image's boxes, a few of them turned over."""
    generator = torch.Generator().manual_seed(seed)
    images, anchors = len(scene.gt.boxes), len(scene.anchors)
    scores = torch.rand(images, anchors, NUM_CLASSES, generator=generator, dtype=torch.float64)
    predicted = scene.anchors.expand(images, -1, -1)
    if scene.gt.boxes.shape[1]:
        chosen = torch.randint(scene.gt.boxes.shape[1], (images, anchors, 1), generator=generator)
        near = scene.gt.boxes.gather(1, chosen.expand(-1, -1, 4))
        share = torch.rand(images, anchors, 1, generator=generator, dtype=torch.float64)
        predicted = predicted + share * (near - predicted)
    noise = torch.randn(predicted.shape, generator=generator, dtype=torch.float64)
    predicted = predicted + noise
    turned = torch.rand(images, anchors, generator=generator) < 0.05
    return scores, torch.where(turned[..., None], predicted.flip(-1), predicted)


def _slow(scene: Scene, image: int, scores, predicted, topk, alpha, beta):
    """Matches and targets of an image."""
    anchors, boxes = scene.anchors.tolist(), boxes_of(scene, image)
    classes = scene.gt.classes[image].tolist()
    best, matches, alignments = [-1.0] * len(anchors), [BACKGROUND] * len(anchors), [0.0] * len(anchors)
    for index, box in enumerate(boxes):
        overlaps = [slow_iou(box, other) for other in predicted[image].tolist()]
        of_class = scores[image, :, classes[index]].tolist()
        aligned = {i: of_class[i] ** alpha * overlaps[i] ** beta for i in usable_anchors(scene, image)}
        for i in sorted(aligned, key=lambda i: -aligned[i])[:topk]:
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = min(x - box[0], box[2] - x, y - box[1], box[3] - y) > 0.01
            if aligned[i] > 0 and inside and overlaps[i] > best[i]:
                matches[i], best[i], alignments[i] = index, overlaps[i], aligned[i]
    targets = [0.0] * len(anchors)
    for index in range(len(boxes)):
        own = [i for i, match in enumerate(matches) if match == index]
        for i in own:
            targets[i] = alignments[i] / (max(alignments[k] for k in own) + 1e-7) * max(best[k] for k in own)
    return matches, targets


def _match(scene: Scene, scores, predicted, topk=13, alpha=1.0, beta=6.0):
    return match_task_aligned(
        scores, predicted, scene.anchors, scene.gt.boxes, scene.gt.classes, scene.gt.valid, scene.valid_anchors,
        topk=topk, alpha=alpha, beta=beta,
    )


@pytest.mark.parametrize("topk, alpha, beta", [(13, 1.0, 6.0), (1, 1.0, 6.0), (1000, 0.5, 2.0)])
@pytest.mark.parametrize("name", SCENES)
def test_matches_loops(name, topk, alpha, beta):
    scene = build(**SCENES[name])
    predictions = _predictions(scene)
    found = _match(scene, *predictions, topk, alpha, beta)
    assert found.matches.dtype == torch.int64 and found.matches.shape == found.scores.shape == (4, len(scene.anchors))
    for image in range(4):
        matches, targets = _slow(scene, image, *predictions, topk, alpha, beta)
        assert found.matches[image].tolist() == matches
        assert found.scores[image].tolist() == pytest.approx(targets, abs=1e-12)
    positive = found.matches >= 0
    assert (topk == 1 or positive.any() == scene.gt.valid.any()) and not found.scores[~positive].any()


def test_the_best_anchor_of_a_box_reaches_its_largest_overlap():
    """But for the released code's constant, which matters where the overlap is small."""
    scene, seen = build(seed=1, counts=(1, 3, 6, 9)), 0
    scores, predicted = _predictions(scene)
    found = _match(scene, scores, predicted)
    for image, boxes in enumerate(scene.gt.boxes.tolist()):
        for index in set(found.matches[image].tolist()) - {BACKGROUND}:
            own = (found.matches[image] == index).nonzero().flatten().tolist()
            overlap = max(slow_iou(boxes[index], predicted[image, i].tolist()) for i in own)
            seen += overlap > 0.3
            assert overlap <= 0.3 or 0.99 * overlap < found.scores[image, own].max().item() < overlap
    assert seen > 3


def test_it_follows_the_predictions():
    """The same anchors, boxes and overlaps: the anchor of the higher score of the box's own class."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12]])
    box, valid = torch.tensor([[[0.0, 0, 16, 16]]]), torch.ones(1, 1, dtype=torch.bool)
    predicted = box.expand(1, 2, 4)
    for better in (0, 1):
        scores = torch.tensor([[[0.2, 0.1], [0.2, 0.1]]])
        scores[0, better, 1] = 0.3
        scores[0, 1 - better, 0] = 0.9  # of another class
        found = match_task_aligned(
            scores, predicted, anchors, box, torch.ones(1, 1, dtype=torch.int64), valid, topk=1, alpha=1.0, beta=6.0
        )
        assert found.matches[0, better] == 0 and found.matches[0, 1 - better] == BACKGROUND
        assert found.scores[0, better].item() == pytest.approx(1)


def test_an_anchor_of_equal_boxes_goes_to_the_first():
    scene = build(0)
    assert (scene.gt.boxes[2, 3] == scene.gt.boxes[2, 4]).all()
    scene.gt.classes[2, 4] = scene.gt.classes[2, 3]
    matches = _match(scene, *_predictions(scene)).matches[2]
    assert (matches == 3).any() and not (matches == 4).any()


def test_padding_and_the_other_images_change_nothing():
    scene = build(seed=1, counts=(1, 3, 6, 9), some_invalid=True)
    scores, predicted = _predictions(scene)
    whole = _match(scene, scores, predicted)
    for image, count in enumerate((1, 3, 6, 9)):
        one, gt = slice(image, image + 1), scene.gt
        alone = match_task_aligned(
            scores[one], predicted[one], scene.anchors, gt.boxes[one, :count], gt.classes[one, :count],
            gt.valid[one, :count], scene.valid_anchors[one], topk=13, alpha=1.0, beta=6.0,
        )
        assert torch.equal(alone.matches[0], whole.matches[image])
        assert torch.equal(alone.scores[0], whole.scores[image])

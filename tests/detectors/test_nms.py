"""``TEST.NMS`` on whole detectors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import box_iou

from d2_distill.detectors.nms import CLUSTER_NMS, ClusterNMS, select_nms
from d2_distill.errors import UserError

from ..small_detectors import ONE_STAGE, batch, build, detector_cfg, image_input


def _build(case, nms, salt=3, max_detections=100, **overrides):
    cfg = detector_cfg(case, **overrides)
    cfg.TEST.NMS = nms
    cfg.TEST.DETECTIONS_PER_IMAGE = max_detections
    return build(cfg, salt=salt).eval()


@torch.no_grad()
def _detect(model, inputs):
    return [output["instances"] for output in model(inputs)]


def _assert_same(actual, expected):
    assert actual.get_fields().keys() == expected.get_fields().keys()
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("name", CLUSTER_NMS)
@pytest.mark.parametrize("case", ONE_STAGE)
def test_output_of_every_detector(case, name):
    own, model = _build(case, "nms"), _build(case, name, max_detections=8)
    assert model.state_dict().keys() == own.state_dict().keys()
    for detections, size in zip(_detect(model, batch()), [(64, 96), (96, 64)]):
        assert detections.image_size == size and len(detections) == 8
        assert (detections.scores.diff() <= 0).all()
        boxes = detections.pred_boxes.tensor
        clipped = Boxes(boxes.clone())
        clipped.clip(size)
        assert torch.allclose(clipped.tensor, boxes, atol=1e-3)


@pytest.mark.parametrize("case", ONE_STAGE)
def test_cluster_nms_is_nms_of_everything_that_the_detector_finds(case):
    everything = _build(case, "nms")
    detector = getattr(everything, "detector", everything)
    threshold, detector.test_nms_thresh = detector.test_nms_thresh, math.inf
    detector.max_detections_per_image = 10**6
    for found, actual in zip(_detect(everything, batch()), _detect(_build(case, "cluster_nms"), batch())):
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, threshold)[:100]
        assert len(keep) < len(found)
        _assert_same(actual, found[keep])


class _AwayFromTheBorder:
    """Forward hook of a stock head: detects nothing in the outer cells, and no box reaches beyond them."""

    def __init__(self, case):
        self.largest_delta = {"RetinaNet": 0.25, "FCOS": 3.0}[case]

    def __call__(self, head, args, outputs):
        logits, deltas, *others = outputs
        inner = []
        for level in logits:
            inner.append(torch.full_like(level, -100.0))
            inner[-1][..., 4:-4, 4:-4] = level[..., 4:-4, 4:-4]
        return (inner, [self.largest_delta * level.sigmoid() for level in deltas], *others)


def _unclipped(case, name, **overrides):
    """What a detector detects in two images, none of it clipped by their borders."""
    model = _build(case, name, **overrides)
    model.head.register_forward_hook(_AwayFromTheBorder(case))
    found = _detect(model, [image_input(320, 384), image_input(320, 384, seed=1)])
    for detections in found:
        boxes = detections.pred_boxes.tensor
        assert len(boxes) > 1 and boxes.min() > 0 and (boxes[:, 2:] < torch.tensor([384, 320])).all()
    return found


@pytest.mark.parametrize("case", ["RetinaNet", "FCOS"])
def test_cluster_nms_equals_the_detectors_own(case):
    """Where no box is clipped: the detector clips after its own NMS, but before the hook."""
    key = f"{case.upper()}__NMS_THRESH_TEST"
    own, clustered = (_unclipped(case, name, **{key: 0.3}) for name in ("nms", "cluster_nms"))
    everything = _unclipped(case, "nms", **{key: 1.0})
    for expected, actual, unsuppressed in zip(own, clustered, everything):
        assert not torch.equal(expected.scores, unsuppressed.scores)
        _assert_same(actual, expected)


@pytest.mark.parametrize("name", CLUSTER_NMS)
@pytest.mark.parametrize("case", ["RetinaNet", "FCOS"])
def test_detections_that_do_not_overlap_stay(case, name):
    one_a_level = {f"{case.upper()}__TOPK_CANDIDATES_TEST": 1}
    own = _unclipped(case, "nms", **one_a_level)
    clustered = _unclipped(case, name, **one_a_level)
    for expected, actual in zip(own, clustered):
        boxes = expected.pred_boxes.tensor
        assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() < 0.5
        _assert_same(actual, expected)


@pytest.mark.parametrize("case", ONE_STAGE)
def test_training_is_untouched(case):
    losses = []
    for name in ("nms", "voting_cluster_diou_nms"):
        model = _build(case, name, salt=None).train()
        with EventStorage():
            losses.append(model(batch()))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])


def test_copies_of_the_model_detect_alike():
    model = _build("RetinaNet", "voting_cluster_diou_nms")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for actual, expected in zip(_detect(copied, batch()), _detect(model, batch())):
            _assert_same(actual, expected)


def test_other_fields_stay_with_their_detections():
    instances = Instances((50, 50))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 20, 20], [30, 30, 40, 40], [1, 0, 21, 20]]))
    instances.scores = torch.tensor([0.3, 0.5, 0.6])
    instances.pred_classes = torch.zeros(3, dtype=torch.int64)
    instances.source = torch.tensor([7, 8, 9])
    for max_detections, sources in ((100, [9, 8]), (1, [9])):
        kept = ClusterNMS(0.5, max_detections, overlap="diou", voting="score").suppress(instances)
        assert kept.source.tolist() == sources and kept.image_size == (50, 50)
        assert 0 < kept.pred_boxes.tensor[0, 0] < 1
    assert instances.pred_boxes.tensor[2].tolist() == [1, 0, 21, 20]


def test_unknown_name():
    with pytest.raises(UserError, match="TEST.NMS is 'soft_nms'; choose one of nms, cluster_nms"):
        _build("RetinaNet", "soft_nms")


def test_two_stage_detector():
    with pytest.raises(UserError, match="TEST.NMS is 'cluster_nms', .* not with GeneralizedRCNN"):
        _build("GeneralizedRCNN", "cluster_nms")
    select_nms(_build("GeneralizedRCNN", "nms"), "nms")

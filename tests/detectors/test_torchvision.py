"""Detectors that detect as torchvision's: their anchors, and where they differ from Detectron2's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.distiller import Distiller
from d2_distill.methods.pairing import same_anchors
from d2_distill.staged import stage_detector

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, save_teacher

TORCHVISION = {"META_ARCHITECTURE": "TorchvisionRetinaNet", "ANCHOR_GENERATOR__NAME": "TorchvisionAnchorGenerator"}
CASES = {"RetinaNet": TORCHVISION, "FCOS": {"META_ARCHITECTURE": "TorchvisionFCOS"}}


@pytest.mark.parametrize("height, width", [(800, 1344), (96, 128), (64, 32), (416, 1088)])
def test_anchors(height, width):
    """Sizes in whole pixels, and the strides of levels that do not divide the image."""
    sizes, strides = [[32, 40, 50], [64, 80, 101], [129, 161, 203]], [32, 64, 128]
    maps = [torch.zeros(1, 1, math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]
    ratios = [0.5, 1.0, 2.0]
    theirs = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * 3)
    [expected] = theirs(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
    expected = to_size_outer(expected.unflatten(0, (-1, 9)), 3, 3, dim=1).flatten(0, 1)

    cfg = get_distill_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME, cfg.MODEL.ANCHOR_GENERATOR.SIZES = "TorchvisionAnchorGenerator", sizes
    generator = build_anchor_generator(cfg, [ShapeSpec(channels=1, stride=stride) for stride in strides])
    anchors = generator(maps)
    assert torch.equal(Boxes.cat(anchors).tensor, expected)
    assert generator.num_anchors == [9, 9, 9] and not generator.state_dict()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_boxes_are_clipped_before_the_suppression(case):
    """Two boxes of a class that only differ outside of the image are one."""
    model = build(detector_cfg(case, **CASES[case]), salt=2).eval()
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 60.0, 60.0], [0.0, 0.0, 160.0, 60.0]]))] * 2
    scores = [torch.tensor([[0.8, 0.0, 0.9], [0.7, 0.6, 0.01]]), torch.zeros(2, 3)]
    deltas = [torch.full((2, 4), 0.5 if case == "FCOS" else 0.0)] * 2  # the anchor itself
    found = model.inference_single_image(anchors, scores, deltas, (60, 50))
    assert found.pred_classes.tolist() == [2, 0, 1]
    assert found.pred_boxes.tensor.tolist() == [[0.0, 0.0, 50.0, 60.0]] * 3
    model.max_detections_per_image = 2
    best = model.inference_single_image(anchors, scores, deltas, (60, 50))
    assert best.scores.tolist() == scores[0][0, [2, 0]].tolist()

    stock = build(detector_cfg(case), salt=2).eval()
    found = stock.inference_single_image(anchors, scores, deltas, (60, 50))
    assert found.pred_classes.tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("nms", ["nms", "cluster_nms"])
@torch.no_grad()
def test_detections(case, nms):
    cfg = detector_cfg(case, **CASES[case])
    cfg.TEST.NMS = nms
    model = build(cfg, salt=2).eval()
    for output, inputs in zip(model(batch()), batch()):
        found = output["instances"]
        assert len(found) > 1 and found.scores.diff().max() <= 0
        assert found.pred_boxes.inside_box((inputs["height"], inputs["width"]), 1e-3).all()
        overlaps = pairwise_iou(found.pred_boxes, found.pred_boxes).triu(1)
        overlaps = overlaps[found.pred_classes[:, None] == found.pred_classes]
        assert overlaps.max() <= (cfg.MODEL[case.upper()].NMS_THRESH_TEST)


@pytest.mark.parametrize("case", CASES)
def test_teachers_and_students(tmp_path, case):
    """As Detectron2's, whose subclasses they are; the teacher's anchors are its own."""
    teacher = save_teacher(tmp_path, case, **CASES[case])
    kind = CASES[case]["META_ARCHITECTURE"]
    for student in ("RetinaNet", case):
        changes = {**CASES[student], "META_ARCHITECTURE": "Distiller"} if student == case else {}
        changes["DISTILL__STUDENT"] = kind if student == case else student
        torch.manual_seed(0)
        model = build_model(distiller_cfg(student, teacher, ["CrossKD", "PKD"], **changes)).prepare_training().train()
        assert isinstance(model, Distiller) and stage_detector(model.student).kind == changes["DISTILL__STUDENT"]
        with EventStorage():
            losses = model(batch())
            sum(losses.values()).backward()
        assert {"loss_crosskd_cls", "loss_crosskd_box", "loss_pkd"} <= set(losses)
        assert all(torch.isfinite(value) and value > 0 for value in losses.values())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_anchors_are_compared_as_a_whole():
    """The same cells on another grid are other anchors."""
    staged = [stage_detector(build(detector_cfg("FCOS", **CASES["FCOS"]))) for _ in range(2)]
    assert same_anchors(*staged)
    regular = copy.deepcopy(stage_detector(build(detector_cfg("FCOS"))))
    assert not same_anchors(staged[0], regular)
    regular.model.anchor_generator.offset = 0.0
    assert not same_anchors(staged[0], regular)

"""CascadeROIHeads by numbers that the real Detectron2 gave, names, settings that it refuses, and empty inputs."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.utils.events import EventStorage

from ..small_detectors import batch, build, detector_cfg, image_input

CASE = "GeneralizedRCNN cascade"
SHAPES = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(2, 6)}

# Recorded from Detectron2 with the parameters of salt 2.
LOSSES = {
    "loss_cls_stage0": 1.61422, "loss_box_reg_stage0": 1.85105,
    "loss_cls_stage1": 4.14993, "loss_box_reg_stage1": 11.96782,
    "loss_cls_stage2": 1.75292, "loss_box_reg_stage2": 24.8684,
    "loss_rpn_cls": 0.66207, "loss_rpn_loc": 0.62521,
}
SCALARS = {
    "roi_head/num_bg_samples": 6.0, "roi_head/num_fg_samples": 2.0,
    "rpn/num_neg_anchors": 29.0, "rpn/num_pos_anchors": 3.0,
    "stage0/fast_rcnn/cls_accuracy": 0.3125, "stage0/fast_rcnn/false_negative": 0.0,
    "stage0/fast_rcnn/fg_cls_accuracy": 0.25,
    "stage1/fast_rcnn/cls_accuracy": 0.1875, "stage1/fast_rcnn/false_negative": 0.0,
    "stage1/fast_rcnn/fg_cls_accuracy": 0.375,
    "stage1/roi_head/num_bg_samples": 4.0, "stage1/roi_head/num_fg_samples": 4.0,
    "stage2/fast_rcnn/cls_accuracy": 0.5, "stage2/fast_rcnn/false_negative": 0.7,
    "stage2/fast_rcnn/fg_cls_accuracy": 0.2,
    "stage2/roi_head/num_bg_samples": 3.0, "stage2/roi_head/num_fg_samples": 5.0,
}
BACKBONE_GRADIENT = 10795.52  # sum of magnitudes; it feels that each stage's share is divided
# Per image: number, first scores, first boxes, first classes.
DETECTIONS = [
    (60, [0.41712, 0.39154, 0.3808, 0.37857, 0.37331], [[75.67, 0.0, 76.92, 55.678], [73.497, 0.0, 94.284, 64.0]],
     [1, 2, 1, 1, 1]),
    (54, [0.42881, 0.42151, 0.41443, 0.41118, 0.40108], [[40.44, 13.058, 63.517, 92.544], [6.858, 0.0, 32.92, 93.98]],
     [1, 1, 1, 1, 1]),
]
# Sums of the weights made from seed 0.
INITIAL_SUMS = {
    "box_head.0.fc1.weight": 3.5798,
    "box_head.0.fc2.weight": 8.1274,
    "box_head.1.fc1.weight": -1.5059,
    "box_head.1.fc2.weight": -7.0725,
    "box_head.2.fc1.weight": 1.0864,
    "box_head.2.fc2.weight": -1.5721,
    "box_predictor.0.cls_score.weight": -0.1944,
    "box_predictor.0.bbox_pred.weight": 0.0093,
    "box_predictor.1.cls_score.weight": -0.0514,
    "box_predictor.1.bbox_pred.weight": 0.0018,
    "box_predictor.2.cls_score.weight": 0.1500,
    "box_predictor.2.bbox_pred.weight": 0.0004,
}


@pytest.fixture(scope="module")
def model():
    return build(detector_cfg(CASE, RESNETS__RES2_OUT_CHANNELS=8), salt=2)  # the width of the recorded numbers


def train(model, inputs):
    torch.manual_seed(3)
    with EventStorage() as storage:
        losses = model.train()(inputs)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


def test_training(model):
    losses, scalars = train(model, batch())
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(LOSSES, rel=1e-4)
    assert list(losses) == list(LOSSES)
    assert scalars == pytest.approx(SCALARS, rel=1e-5)
    model.zero_grad()
    sum(losses.values()).backward()
    gradient = sum(p.grad.double().abs().sum() for p in model.backbone.parameters()).item()
    assert gradient == pytest.approx(BACKBONE_GRADIENT, rel=1e-3)
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_detections(model):
    for output, (count, scores, boxes, classes) in zip(model.eval()(batch()), DETECTIONS):
        instances = output["instances"]
        assert len(instances) == count and instances.pred_classes[:5].tolist() == classes
        torch.testing.assert_close(instances.scores[:5], torch.tensor(scores), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(instances.pred_boxes.tensor[:2], torch.tensor(boxes), rtol=1e-4, atol=1e-2)


def test_initial_weights():
    """Seed 0 gives Detectron2's own weights, so stages are made in its order."""
    torch.manual_seed(0)
    state = ROI_HEADS_REGISTRY.get("CascadeROIHeads")(detector_cfg(CASE), SHAPES).state_dict()
    sums = {name: value.double().sum().item() for name, value in state.items() if name.endswith("weight")}
    assert sums == pytest.approx(INITIAL_SUMS, abs=1e-4)
    biases = [name.replace("weight", "bias") for name in sums]
    assert set(state) == {*sums, *biases} and not any(state[name].any() for name in biases)


@pytest.mark.parametrize("objects", [([[4, 4, 5, 5]], [1]), ([], [])])
def test_hardly_any_ground_truth(model, objects):
    losses, _ = train(model, [image_input(64, 96, *objects), image_input(96, 64)])
    assert all(loss.isfinite() for loss in losses.values())
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_no_proposal_at_all():
    model = build(detector_cfg(CASE, PROPOSAL_GENERATOR__MIN_SIZE=1000)).eval()
    assert [len(x["instances"]) for x in model(batch())] == [0, 0]


@pytest.mark.parametrize(
    "key, value",
    [
        ("ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG", False),
        ("ROI_BOX_CASCADE_HEAD__IOUS", (0.6, 0.6, 0.7)),
        ("ROI_BOX_CASCADE_HEAD__IOUS", (0.5, 0.6)),
    ],
)
def test_settings_that_do_not_fit(key, value):
    cfg = detector_cfg(CASE, **{key: value})
    with pytest.raises(AssertionError):
        ROI_HEADS_REGISTRY.get("CascadeROIHeads")(cfg, SHAPES)


def test_a_single_stage():
    """One stage is enough, and is StandardROIHeads' with other names."""
    cascade = build(detector_cfg(
        CASE, ROI_BOX_CASCADE_HEAD__IOUS=(0.5,), ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS=((10.0, 10.0, 5.0, 5.0),)
    ))
    standard = build(detector_cfg("GeneralizedRCNN", ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True))
    assert isinstance(cascade.roi_heads, CascadeROIHeads) and cascade.roi_heads.num_cascade_stages == 1
    losses, _ = train(cascade, batch())
    expected, _ = train(standard, batch())
    assert {name.replace("_stage0", ""): loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}
    )

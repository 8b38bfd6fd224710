"""Pairs that work, through adapters or not at all, and the sentences for those that do not."""

from __future__ import annotations

import pytest
import torch

from d2_distill.errors import UserError
from d2_distill.methods import build_methods
from d2_distill.methods.pairing import FeaturePair, pair_features
from d2_distill.staged import Tap, stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import batch, build, detector_cfg, distiller_cfg

TWO_LEVELS = {"RETINANET__IN_FEATURES": ["p3", "p4"], "ANCHOR_GENERATOR__SIZES": [[16, 24], [32, 48]]}
HIGH_LEVELS = {
    "RESNETS__OUT_FEATURES": ["res5"], "FPN__IN_FEATURES": ["res5"], "RETINANET__IN_FEATURES": ["p5"],
    "ANCHOR_GENERATOR__SIZES": [[64]],
}
LOW_LEVELS = {
    "RESNETS__OUT_FEATURES": ["res3"], "FPN__IN_FEATURES": ["res3"], "RETINANET__IN_FEATURES": ["p3"],
    "ANCHOR_GENERATOR__SIZES": [[16]],
}


def staged(case, **overrides):
    return stage_detector(build(detector_cfg(case, **overrides)))


def methods_of(method, student, teacher, classes=(), **overrides):
    """Build one method for (case, overrides) of student and teacher."""
    (case, ours), (teacher_case, theirs) = student, teacher
    cfg = distiller_cfg(case, None, [method], **{**ours, **overrides})
    other = detector_cfg(teacher_case, **theirs)
    teacher = Teacher(build(other, salt=1), input_format="BGR", classes=classes, cfg=other)
    return build_methods(cfg, staged(case, **ours), teacher)


RETINANET, FCOS, RCNN = ("RetinaNet", {}), ("FCOS", {}), ("GeneralizedRCNN", {})


@pytest.mark.parametrize(
    "student, teacher, overrides, message",
    [
        (RCNN, FCOS, {}, "cannot use the student GeneralizedRCNN .*teacher FCOS.; both must be one-stage"),
        (RETINANET, RCNN, {}, "cannot use the teacher GeneralizedRCNN .student RetinaNet, teacher General"),
        (RETINANET, ("RetinaNet", TWO_LEVELS), {}, r"student's head reads strides \[8, 16, 32\] .*\[8, 16\]"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__CLS_TAP": 3}, "CLS_TAP is 3; .*must lie between 0 and 2"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__BOX_TAP": -2}, "BOX_TAP is -2; .*must lie between 0 and 2"),
        (
            RETINANET, ("RetinaNet", {"RETINANET__NUM_CONVS": 1}), {"DISTILL__CROSSKD__CLS_TAP": 2},
            "student's towers have 2 blocks and the teacher's 1 .*must lie between 0 and 1",
        ),
        (
            RETINANET, ("RetinaNet", {"RETINANET__NUM_CLASSES": 5}), {},
            "student has 3 classes and the teacher 5",
        ),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__BOX_LOSS": "l1"}, "BOX_LOSS is 'l1'; .* auto, kl, giou, iou"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__BOX_LOSS": "kl"}, "'kl', but the teacher .RetinaNet. predicts no"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__TAP_ACTIVATION": "relu"}, "TAP_ACTIVATION is 'relu'; .* post, pre"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__BOX_TEMPERATURE": 0.0}, "BOX_TEMPERATURE is 0.0; it must be pos"),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__NORMALIZER_FLOOR": 0.0}, "NORMALIZER_FLOOR is 0.0; it must be p"),
        (
            RETINANET, FCOS, {"DISTILL__CROSSKD__CENTERNESS_WEIGHT": 1.0},
            "CENTERNESS_WEIGHT is not 0, but the student .RetinaNet. predicts no centerness",
        ),
        (
            FCOS, ("GFL", {}), {"DISTILL__CROSSKD__CENTERNESS_WEIGHT": 1.0},
            "CENTERNESS_WEIGHT is not 0, but the teacher .GFL. predicts no centerness",
        ),
        (
            FCOS, ("ATSS", {}), {"DISTILL__CROSSKD__CENTERNESS_WEIGHT": 1.0},
            "anchors of the student .FCOS. and the teacher .ATSS. differ, and centerness belongs",
        ),
        (RETINANET, RETINANET, {"DISTILL__CROSSKD__CLS_BETA": 0.5}, "CLS_BETA is 0.5; it must be at least 1"),
    ],
)
def test_pairs_that_crosskd_refuses(student, teacher, overrides, message):
    with pytest.raises(UserError, match=message):
        methods_of("CrossKD", student, teacher, **overrides)


@pytest.mark.parametrize(
    "student, teacher", [("RetinaNet", "OpenMMLabRetinaNet"), ("RetinaNet BN", "RetinaNet")]
)
def test_pairs_of_different_retinanets(student, teacher):
    assert list(methods_of("CrossKD", (student, {}), (teacher, {}))) == ["CrossKD"]
    deeper = (teacher, {"RETINANET__NUM_CONVS": 4})
    assert methods_of("CrossKD", (student, {}), deeper)["CrossKD"].taps() == {"cls": {Tap(1)}, "box": {Tap(1)}}


def test_pkd_adapts_channels_that_differ():
    narrow = ("FCOS", {"FPN__OUT_CHANNELS": 16, "FCOS__NORM": ""})
    adapters = methods_of("PKD", narrow, RCNN)["PKD"].adapters
    assert {name: (layer.in_channels, layer.out_channels) for name, layer in adapters.items()} == dict.fromkeys(
        ("p3", "p4", "p5"), (16, 32)
    )
    assert not methods_of("PKD", FCOS, RCNN)["PKD"].adapters


def test_msad_needs_equal_channels():
    narrow = ("FCOS", {"FPN__OUT_CHANNELS": 16, "FCOS__NORM": ""})
    message = r"student's p3 has 16 channels and the teacher's p3 has 32; .*serve this pair: FeatureImitation, PKD, TFHEAD\.$"
    with pytest.raises(UserError, match=message):
        methods_of("MSAD", narrow, RCNN)


@pytest.mark.parametrize("method, node", [("PKD", "PKD"), ("FeatureImitation", "IMITATION")])
def test_features_that_have_no_counterpart(method, node):
    key = f"MODEL.DISTILL.{node}.IN_FEATURES"
    for wanted, message in [
        ("p9", "has 'p9', which the student lacks; choose from p2, p3, p4, p5"),
        ("p2", r"has 'p2' of stride 4, and the teacher \(RetinaNet\) has strides \[8, 16, 32\] only"),
    ]:
        with pytest.raises(UserError, match=f"{key} {message}"):
            methods_of(method, RCNN, RETINANET, **{f"DISTILL__{node}__IN_FEATURES": (wanted,)})
    message = r": the student \(RetinaNet, strides \[8\]\) and the teacher \(RetinaNet, strides \[32\]\) have"
    with pytest.raises(UserError, match=key + message):
        methods_of(method, ("RetinaNet", LOW_LEVELS), ("RetinaNet", HIGH_LEVELS))


def test_pairs_by_stride_across_pyramids():
    """Faster R-CNN's p2 to p6 and RetinaNet's p3 to p7, as Detectron2 builds them."""
    standard = {"BACKBONE__NAME": "build_resnet_fpn_backbone", "RESNETS__RES2_OUT_CHANNELS": 64}
    rcnn = staged(
        "GeneralizedRCNN", **standard, RPN__IN_FEATURES=["p2", "p3", "p4", "p5", "p6"],
        ANCHOR_GENERATOR__SIZES=[[16], [32], [64], [96], [128]],
    )
    standard["BACKBONE__NAME"] = "build_retinanet_resnet_fpn_backbone"
    retinanet = staged(
        "RetinaNet", **standard, FPN__OUT_CHANNELS=16, RETINANET__IN_FEATURES=["p3", "p4", "p5", "p6", "p7"],
        ANCHOR_GENERATOR__SIZES=[[16], [32], [64], [96], [128]],
    )
    assert list(rcnn.feature_shapes()) == ["p2", "p3", "p4", "p5", "p6"]
    names = ["p3", "p4", "p5", "p6"]
    assert pair_features(retinanet, rcnn, (), "key") == [FeaturePair(name, name, 16, 32) for name in names]
    assert pair_features(rcnn, retinanet, (), "key") == [FeaturePair(name, name, 32, 16) for name in names]
    chosen = pair_features(rcnn, retinanet, ["p6", "p3"], "key")
    assert chosen == [FeaturePair(name, name, 32, 16) for name in ("p6", "p3")]


def test_adapters_bridge_channels():
    narrow = ("FCOS", {"FPN__OUT_CHANNELS": 16, "FCOS__NORM": ""})
    method = methods_of("FeatureImitation", narrow, RCNN)["FeatureImitation"]
    assert {name: tuple(a.weight.shape) for name, a in method.adapters.items()} == {
        "p3": (32, 16, 1, 1), "p4": (32, 16, 1, 1), "p5": (32, 16, 1, 1),
    }
    student, teacher = staged(narrow[0], **narrow[1]), staged("GeneralizedRCNN")
    images = student.preprocess(batch())
    ours, theirs = student.run(images), teacher.run(images, frozen=True)
    adapted = {name: adapter(ours.features[name]) for name, adapter in method.adapters.items()}
    expected = sum(((feature - theirs.features[name]) ** 2).mean() for name, feature in adapted.items())
    torch.testing.assert_close(method(ours, theirs), {"loss_imitation": expected})


@pytest.mark.parametrize("name", ["PKD", "FeatureImitation"])
def test_maps_of_another_size_are_resized(name):
    """A teacher that pads the batch to larger maps."""
    method = methods_of(name, RETINANET, RETINANET)[name]
    student, teacher = staged("RetinaNet"), staged("RetinaNet")
    ours = student.run(student.preprocess(batch()))
    larger = [{**x, "image": torch.nn.functional.pad(x["image"], (0, 32, 0, 32))} for x in batch()]
    theirs = teacher.run(teacher.preprocess(larger), frozen=True)
    assert ours.features["p3"].shape != theirs.features["p3"].shape
    (loss,) = method(ours, theirs).values()
    assert loss.isfinite() and loss > 0

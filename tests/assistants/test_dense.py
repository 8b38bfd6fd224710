"""A dense assistant is the whole detector of its kind, but for the backbone: that is the student's."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.assistants.dense import DenseAssistant, end_channels, tower_ends
from d2_distill.errors import UserError
from d2_distill.staged import Tap, stage_detector

from ..small_detectors import batch, build, detector_cfg, image_input

KINDS = [
    "RetinaNet", "RetinaNet BN", "OpenMMLabRetinaNet", "FCOS", "OpenMMLabFCOS", "OpenMMLabFCOS distributions",
    "ATSS", "GFL", "GFLv2",
]
BATCHES = {
    "two images": batch(),
    "an image without boxes": [image_input(64, 96), *batch()],
    "no boxes": [image_input(64, 96), image_input(96, 64, seed=1)],
    "a box of one pixel": [image_input(96, 96, [[40, 40, 41, 41]], [1])],
}


def student_of(case: str = "RetinaNet", **overrides):
    return stage_detector(build(detector_cfg(case, **overrides), salt=2).train())


def assistant_of(kind: str, student, names=None, **overrides) -> DenseAssistant:
    torch.manual_seed(7)
    cfg = detector_cfg(kind, **overrides)
    return DenseAssistant.build(cfg, kind.split()[0], student, names=names, key="KEY").train()


def runs(student, assistant, inputs):
    run = student.run(student.preprocess(inputs), [x["instances"] for x in inputs])
    return run, assistant(run)


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_its_losses_are_those_of_a_detector_with_the_students_backbone(kind, inputs):
    student = student_of()
    assistant = assistant_of(kind, student)
    # Of the student's backbone and the assistant's head, without any stage or stand-in.
    whole = build(detector_cfg(kind, RESNETS__NORM=detector_cfg("RetinaNet").MODEL.RESNETS.NORM)).train()
    whole.backbone.load_state_dict(student.model.backbone.state_dict())
    whole.head.load_state_dict(assistant.detector.head.state_dict())
    with EventStorage():
        expected = whole(BATCHES[inputs])
        ours, run = runs(student, assistant, BATCHES[inputs])
        assert set(run.losses) == set(expected) and len(expected) > 1
        for name, loss in run.losses.items():
            assert loss.isfinite() and torch.equal(loss, expected[name]), name
        wanted = [*assistant.parameters(), *ours.features.values()]
        found = torch.autograd.grad(sum(run.losses.values()), wanted)
        sum(expected.values()).backward()
    for gradient, parameter in zip(found, whole.head.parameters()):
        torch.testing.assert_close(gradient, parameter.grad)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found[-3:])


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_a_head_and_no_backbone(kind):
    assistant = assistant_of(kind, student_of())
    whole = build(detector_cfg(kind))
    head = [f"detector.{name}" for name in whole.state_dict() if name.startswith("head.")]
    assert list(assistant.state_dict()) == head
    assert list(assistant.detector.backbone.output_shape()) == ["p3", "p4", "p5"]


def test_it_has_the_students_classes_and_channels():
    student = student_of("FCOS", FCOS__NUM_CLASSES=5, FPN__OUT_CHANNELS=64)
    assistant = assistant_of("GFL", student)
    assert assistant.staged.num_classes == 5
    assert assistant.detector.head.cls_score.weight.shape == (5, 64, 3, 3)
    assert end_channels(assistant.staged, "cls") == 64


def test_it_may_read_fewer_levels_under_other_names():
    student = student_of()
    names = {"fine": "p3", "middle": "p4", "coarse": "p5"}
    overrides = {"GFL__IN_FEATURES": ["middle", "coarse"]}
    assistant = assistant_of("GFL", student, names, **overrides)
    ours, run = runs(student, assistant, batch())
    assert list(run.features) == ["middle", "coarse"] and assistant.names == {"middle": "p4", "coarse": "p5"}
    assert run.features["middle"] is ours.features["p4"] and run.features["coarse"] is ours.features["p5"]
    assert [x.shape[-1] for x in tower_ends(run, "box")] == [6, 3]
    with EventStorage():
        assert all(loss.isfinite() for loss in run.losses.values())


def test_ends_of_towers():
    student = student_of()
    ours, run = runs(student, assistant_of("GFL", student), batch())
    for level, (x, end) in enumerate(zip(ours.features.values(), tower_ends(run, "cls"))):
        assert torch.equal(end, run.staged.model.head.cls_subnet(x)), level
        assert torch.equal(tower_ends(ours, "box")[level], ours.taps["box"][Tap(2)][level])
    without_convs = student_of("GFL", GFL__NUM_CONVS=0)
    assert end_channels(without_convs, "cls") == end_channels(student, "cls") == 32


def test_keys_of_the_backbone_and_of_detection_do_not_matter():
    """They may ask for what the stand-in, or the assistant's kind, does not have."""
    backbone = {"BACKBONE__NAME": "build_swin_fpn_backbone", "BACKBONE__FIXED_BN_STATISTICS": True}
    cfg = detector_cfg("RetinaNet", **backbone)
    cfg.TEST.NMS = "cluster_nms"
    before = cfg.dump()
    cfg.freeze()
    assistant = DenseAssistant.build(cfg, "FCOS", student_of(), key="KEY")
    assert type(assistant.detector).__name__ == "FCOS" and cfg.dump() == before and cfg.is_frozen()


def test_load_copies_the_head():
    student, teacher = student_of(), build(detector_cfg("GFL"), salt=1)
    assistant = assistant_of("GFL", student)
    assistant.load(teacher)
    ours = assistant.detector.head.state_dict()
    for (name, value), theirs in zip(ours.items(), teacher.head.state_dict().values()):
        assert torch.equal(value, theirs) and value.data_ptr() != theirs.data_ptr(), name
    assert all(p.requires_grad for p in assistant.parameters())


def test_load_needs_equal_channels():
    assistant = assistant_of("GFL", student_of(FPN__OUT_CHANNELS=64))
    message = r"cls_subnet.0.weight is \(64, 64.*\(32, 32.*MODEL.FPN.OUT_CHANNELS.*'fresh'"
    with pytest.raises(UserError, match=message):
        assistant.load(build(detector_cfg("GFL")))


@pytest.mark.parametrize("kind", ["GeneralizedRCNN", "Distiller", "Unknown"])
def test_other_kinds_are_refused(kind):
    import d2_distill.distiller  # noqa: F401  registers it

    with pytest.raises(UserError, match=f"KEY is '{kind}', which is no one-stage detector; .*OpenMMLabFCOS"):
        DenseAssistant.build(detector_cfg("RetinaNet"), kind, student_of(), key="KEY")


@pytest.mark.parametrize("kind, family", [("RetinaNet", "RETINANET"), ("GFL", "GFL")])
def test_features_that_the_student_lacks_are_refused(kind, family):
    with pytest.raises(UserError, match=r"'p6'.*p3, p4, p5"):
        assistant_of(kind, student_of(), **{f"{family}__IN_FEATURES": ["p5", "p6"]})

"""The R-CNN assistant: from which features it pools, what it copies, how it samples, what its stages weigh."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align

from d2_distill.assistants.roi import RoIAssistant, roi_features
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector

from ..small_detectors import NUM_CLASSES, batch, build, detector_cfg, image_input

CHANNELS = 32
CASES = ["GeneralizedRCNN", "GeneralizedRCNN cascade"]


def shapes(*strides: int):
    return {f"p{int(math.log2(stride))}": ShapeSpec(channels=CHANNELS, stride=stride) for stride in strides}


def assistant(case: str = "GeneralizedRCNN", strides=(8, 16, 32), **overrides) -> RoIAssistant:
    torch.manual_seed(0)
    return RoIAssistant.build(detector_cfg(case, **overrides), shapes(*strides), NUM_CLASSES).train()


def maps(strides=(8, 16, 32)):
    generator = torch.Generator().manual_seed(3)
    return {
        f"p{int(math.log2(stride))}": torch.randn(2, CHANNELS, 96 // stride, 96 // stride, generator=generator)
        for stride in strides
    }


def ground_truth(inputs):
    return [x["instances"] for x in inputs]


def proposals(count: int = 30, size=(64, 64)):
    generator = torch.Generator().manual_seed(4)
    found = []
    for image in range(2):
        corner = torch.rand(count, 2, generator=generator) * 40
        sides = 1 + torch.rand(count, 2, generator=generator) * 50
        found.append(
            Instances(
                size,
                proposal_boxes=Boxes(torch.cat([corner, corner + sides], dim=1)),
                objectness_logits=torch.randn(count, generator=generator),
                positions=torch.randint(0, 3, (count, 4), generator=generator),
            )
        )
    return found


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16, 32), (16, 32), (8,)])
def test_regions_are_pooled_by_the_rank_of_the_feature(strides):
    """Slow form of the rule: the feature of rank floor(log2(side / 56)), from the finest on."""
    heads, features = assistant(strides=strides).roi_heads, maps(strides)
    corners = torch.tensor([[3.0, 5.0, 50.0, 60.0], [0.0, 0.0, 95.0, 90.0], [10.0, 20.0, 11.0, 21.0]])
    corners = torch.cat([corners, torch.tensor([[0.0, 0.0, 500.0, 480.0], [7.0, 2.0, 107.0, 181.0]])])
    found = heads.box_pooler(list(features.values()), [Boxes(corners), Boxes(corners[:2])])
    assert len(found) == 7
    rows = [(0, box) for box in corners] + [(1, box) for box in corners[:2]]
    for row, (image, box) in zip(found, rows):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        rank = min(max(math.floor(math.log2(side / 56)), 0), len(strides) - 1)
        feature = list(features.values())[rank][image : image + 1]
        expected = roi_align(feature, [box[None]], 7, 1 / strides[rank], sampling_ratio=0, aligned=True)
        torch.testing.assert_close(row, expected[0])


@pytest.mark.parametrize("case, kind", zip(CASES, (StandardROIHeads, CascadeROIHeads)))
def test_it_is_the_heads_of_its_config_without_more(case, kind):
    """Other features and classes than the config's; a checkpoint of these heads fits by name."""
    built = assistant(case, ROI_HEADS__NUM_CLASSES=7, ROI_HEADS__IN_FEATURES=["p2", "p3"])
    heads = built.roi_heads
    assert type(heads) is kind and heads.num_classes == NUM_CLASSES and not heads.proposal_append_gt
    assert list(heads.box_in_features) == ["p3", "p4", "p5"]
    plain = build(detector_cfg(case)).roi_heads
    assert {name: value.shape for name, value in heads.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }


@pytest.mark.parametrize("case", CASES)
def test_load_copies_the_teachers_box_branch(case):
    built, teacher = assistant(case), build(detector_cfg(case), salt=1).roi_heads
    built.load(teacher)
    theirs = teacher.state_dict()
    for name, value in built.roi_heads.state_dict().items():
        assert torch.equal(value, theirs[name]) and value.data_ptr() != theirs[name].data_ptr(), name
    assert all(p.requires_grad for p in built.parameters())


@pytest.mark.parametrize(
    "overrides, name, other",
    [
        ({"FPN__OUT_CHANNELS": 16}, "box_head.fc1.weight", r"\(32, 784\)"),
        ({"ROI_BOX_HEAD__NUM_FC": 1}, "box_head.fc2.weight", "missing"),
    ],
)
def test_load_needs_an_equal_head(overrides, name, other):
    teacher = build(detector_cfg("GeneralizedRCNN", **overrides)).roi_heads
    message = rf"{name} is .* in the assistant and {other} in the teacher; .*ASSISTANT_INIT to 'fresh'"
    with pytest.raises(UserError, match=message):
        assistant().load(teacher)


def test_sample_adds_ground_truth_and_keeps_positions():
    built, truth = assistant(ROI_HEADS__BATCH_SIZE_PER_IMAGE=256), ground_truth(batch())
    given = proposals()
    with EventStorage():
        sampled = built.sample(given, truth)
    for found, before, objects in zip(sampled, given, truth):
        of_truth = found.positions[:, 0] < 0
        order = found.positions[of_truth, 3]
        assert sorted(order.tolist()) == list(range(len(objects)))
        assert torch.equal(found.proposal_boxes.tensor[of_truth], objects.gt_boxes.tensor[order])
        assert torch.equal(found.gt_classes[of_truth], objects.gt_classes[order])
        rows = {tuple(row) for row in torch.cat([before.proposal_boxes.tensor, before.positions], dim=1).tolist()}
        ours = torch.cat([found.proposal_boxes.tensor, found.positions], dim=1)[~of_truth].tolist()
        assert len(ours) == len(rows) and {tuple(row) for row in ours} == rows


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_stages_at_falling_weights(case):
    built = assistant(case)
    with EventStorage():
        sampled = built.sample(proposals(), ground_truth(batch()))
        found = built(maps(), sampled, ground_truth(batch()))
        full = built.staged.losses(found.stages)
    assert len(found.stages) == (3 if "cascade" in case else 1) and len(full) == 2 * len(found.stages)
    for name, loss in full.items():
        weight = {"0": 1.0, "1": 0.5, "2": 0.25}[name[-1]] if "cascade" in case else 1.0
        assert loss > 0
        torch.testing.assert_close(found.losses[name], weight * loss)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "inputs",
    [
        [image_input(64, 64), image_input(64, 64, seed=1)],
        [image_input(64, 64, [[20, 20, 21, 21]], [1]), image_input(64, 64)],
    ],
    ids=["no object", "one pixel"],
)
@pytest.mark.parametrize("count", [0, 30])
def test_hardly_any_rois(case, inputs, count):
    built, features = assistant(case), {name: x.requires_grad_() for name, x in maps().items()}
    with EventStorage():
        sampled = built.sample(proposals(count), ground_truth(inputs))
        found = built(features, sampled, ground_truth(inputs))
    total = sum(found.losses.values())
    assert total.isfinite() and bool(total > 0) == any(len(image) for image in sampled)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())
    assert all(x.grad is not None and x.grad.isfinite().all() for x in features.values())


def student(case: str, **overrides):
    return stage_detector(build(detector_cfg(case, **overrides)))


def test_features_are_the_finest():
    fine = student("GeneralizedRCNN")
    assert list(roi_features(fine, (), "KEY")) == ["p2", "p3", "p4", "p5"]
    assert list(roi_features(fine, (), "KEY", count=2)) == ["p2", "p3"]
    assert list(roi_features(fine, ("p3", "p4"), "KEY")) == ["p3", "p4"]
    found = roi_features(student("RetinaNet"), (), "KEY")
    assert {name: (shape.channels, shape.stride) for name, shape in found.items()} == {
        "p3": (32, 8), "p4": (32, 16), "p5": (32, 32)
    }


@pytest.mark.parametrize(
    "names, message",
    [
        (("p2",), "KEY has 'p2', which the student lacks; choose from p3, p4, p5"),
        (("p3", "p5"), r"KEY: RoIs cannot be pooled from p3, p5 of strides \[8, 32\]; .* double"),
        (("p4", "p3"), r"strides \[16, 8\]"),
    ],
)
def test_features_that_cannot_be_pooled_from(names, message):
    with pytest.raises(UserError, match=message):
        roi_features(student("RetinaNet"), names, "KEY")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"ROI_HEADS__NAME": "Res5ROIHeads"}, "ROI_HEADS.NAME is 'Res5ROIHeads' in the teacher's .*StandardROIHeads"),
        ({"ROI_BOX_HEAD__NUM_FC": 0}, "NUM_FC 0 in the teacher's config.* NUM_FC to 1"),
        ({"ROI_BOX_HEAD__NAME": "Other"}, "NAME 'Other' and NUM_FC 2 in the teacher's config.*'FastRCNNConvFCHead'"),
    ],
)
def test_configs_that_describe_no_assistant(overrides, message):
    with pytest.raises(UserError, match=message):
        cfg = detector_cfg("GeneralizedRCNN", **overrides)
        RoIAssistant.build(cfg, shapes(8, 16), NUM_CLASSES, owner="teacher")

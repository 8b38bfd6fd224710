"""MSAD's teacher: three branches of one detector, against that detector on each resolution alone."""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.backbones import LowResolution
from d2_distill.detectors import MultiScaleDetector
from d2_distill.detectors.building import num_classes_key
from d2_distill.detectors.multi_scale import StagedMultiScale
from d2_distill.errors import UserError
from d2_distill.layers.fusion import ScaleFusion
from d2_distill.staged import StagedDense, stage_detector

from ..low_resolution_pairs import LEVELS, STAGES, of_student, of_teacher
from ..same_detections import assert_same_detections
from ..small_detectors import batch, build, detector_cfg, distiller_cfg, image_input

DETECTORS = ["RetinaNet", "OpenMMLabRetinaNet", "FCOS", "OpenMMLabFCOS", "ATSS", "GFL", "GFLv2", "TOOD"]
BOXES = [[8, 8, 60, 64], [64, 20, 120, 100]]


def teacher_cfg(detector: str = "OpenMMLabFCOS", factor: int = 2, **overrides) -> CfgNode:
    return detector_cfg("MultiScaleDetector", **{**of_teacher(detector, factor), **overrides})


def teacher(*args, salt=2, **overrides) -> MultiScaleDetector:
    return build(teacher_cfg(*args, **overrides), salt=salt)


def whole_inputs(number: int = 2):
    """Images that need no padding."""
    return [image_input(128, 128, BOXES, [0, 2], seed=index) for index in range(number)]


def low_detector(model: MultiScaleDetector, case: str = "OpenMMLabFCOS") -> nn.Module:
    """The detector on the lower resolution alone, with the same weights."""
    single = build(detector_cfg(case, **of_student()))
    state = model.detector.state_dict()
    names = {name: name.replace("backbone.pyramid.", "backbone.") for name in single.state_dict()}
    single.load_state_dict({name: state[source] for name, source in names.items()})
    return single


class FusedMaps(Backbone):
    """Gives maps computed before."""

    def __init__(self, maps, shapes) -> None:
        super().__init__()
        self.maps, self.shapes = maps, shapes

    def forward(self, images):
        return self.maps

    def output_shape(self):
        return self.shapes


# Fusion.


def slow_fusion(fusion: ScaleFusion, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """By loops, with the weights of each image, or of the first."""
    first, second = fusion.fc[0].weight, fusion.fc[2].weight
    fused = torch.zeros_like(high)
    for image in range(len(high)):
        of = 0 if fusion.first_image else image
        means = [x[of, channel].mean() for x in (high, low) for channel in range(high.shape[1])]
        hidden = [max(sum(w * m for w, m in zip(row, means)), torch.zeros(())) for row in first]
        scores = [sum(w * h for w, h in zip(row, hidden)).exp() for row in second]
        fused[image] = (scores[0] * high[image] + scores[1] * low[image]) / (scores[0] + scores[1])
    return fused


@pytest.mark.parametrize("first_image", [False, True])
def test_fusion(first_image):
    torch.manual_seed(0)
    fusion = ScaleFusion(6, reduction=4, first_image=first_image).double()
    assert [tuple(x.shape) for x in fusion.parameters()] == [(3, 12), (2, 3)]
    high, low = (torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fused = fusion(high, low)
    torch.testing.assert_close(fused, slow_fusion(fusion, high, low))
    scores = fusion.scores(high, low)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert (scores[0] - scores[1]).abs().max() > 1e-4
    ours = torch.autograd.grad(fused.square().sum(), [high, low, *fusion.parameters()])
    slow = slow_fusion(fusion, high, low)
    theirs = torch.autograd.grad(slow.square().sum(), [high, low, *fusion.parameters()])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_both_forms_of_fusion_are_one_for_a_single_image():
    torch.manual_seed(0)
    fusion, high, low = ScaleFusion(8), torch.randn(1, 8, 3, 3), torch.randn(1, 8, 3, 3)
    expected = fusion(high, low)
    fusion.first_image = True
    assert torch.equal(fusion(high, low), expected)


# The branches.


def test_parameters_are_the_detectors_and_the_fusions():
    model = teacher()
    inner = build(detector_cfg("OpenMMLabFCOS", **of_teacher()))
    assert list(model.detector.state_dict()) == list(inner.state_dict())
    assert set(model.state_dict()) == {f"detector.{name}" for name in inner.state_dict()} | {
        "fusion.fc.0.weight", "fusion.fc.2.weight"
    }
    assert model.size_divisibility == 128 and teacher(factor=4).size_divisibility == 512


@pytest.mark.parametrize("factor", [2, 4])
def test_maps_of_both_resolutions(factor):
    model = teacher(factor=factor).eval()
    images = model.preprocess_image(batch()).tensor
    assert all(side % model.size_divisibility == 0 for side in images.shape[-2:])
    with torch.no_grad():
        high, low = model.high(images), model.low(images)
        whole, small = model.backbone(images), model.backbone(images[..., ::factor, ::factor])
    names = LEVELS[factor]
    assert list(high) == list(low) == names
    for name, lower in zip(names, ["p2", "p3", "p4", "p5"]):
        assert torch.equal(high[name], whole[name]) and torch.equal(low[name], small[lower])
        assert high[name].shape == low[name].shape


def test_sizes_agree_for_any_image():
    """Only shapes are computed."""
    model = teacher().eval().to("meta")
    for height, width in [(1, 1), (800, 1333), (257, 511), (640, 383)]:
        image = torch.zeros(3, height, width, device="meta")
        images = ImageList.from_tensors([image], model.size_divisibility).tensor
        high, low = model.high(images), model.low(images)
        assert [x.shape for x in high.values()] == [x.shape for x in low.values()]


@pytest.mark.parametrize("detector", ["OpenMMLabFCOS", "GFL", "TOOD"])
def test_losses_are_the_detectors_on_each_resolution(detector):
    """The normaliser of these detectors does not run over steps, so that each branch stands alone."""
    model, inputs = teacher(detector).train(), whole_inputs()
    with EventStorage():
        losses = copy.deepcopy(model)(inputs)
        high = copy.deepcopy(model.detector)(inputs)
        low = low_detector(model, detector).train()(inputs)
        run = stage_detector(model).run(model.preprocess_image(inputs), [x["instances"] for x in inputs])
        single, shapes = copy.deepcopy(model.detector), model.backbone.output_shape()
        single.backbone = FusedMaps(run.features, shapes)
        fused = single(inputs)
    expected = {f"{name}_hr": loss for name, loss in high.items()}
    expected.update({f"{name}_lr": loss for name, loss in low.items()})
    expected.update({f"{name}_fr": loss * 0.4 for name, loss in fused.items()})
    assert list(losses) == list(expected) and len(losses) == (6 if detector == "TOOD" else 9)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=lambda text: f"{name}: {text}")
    assert len({round(loss.item(), 6) for name, loss in losses.items() if "cls" in name}) == 3


@pytest.mark.parametrize("detector, times", [("GFL", 1), ("TOOD", 3)])
def test_targets_are_assigned_once(detector, times):
    """But for an assigner that reads what each branch predicts."""
    model = teacher(detector).train()
    assigner = model.detector.assigner
    flags = {name: getattr(assigner, name) for name in ("assigns_points", "reads_predictions")}
    model.detector.assigner = mock.Mock(wraps=assigner, **flags)
    with EventStorage():
        assert len(model(batch())) == 9 - 3 * (detector == "TOOD")
    assert model.detector.assigner.call_count == times


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_parameter_gets_a_gradient(detector, factor):
    for inputs in (batch(), [image_input(64, 96), image_input(96, 64, seed=1)]):
        model = teacher(detector, factor, salt=None).train()
        with EventStorage():
            losses = model(inputs)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


# Detection.


def detections(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def test_each_branch_detects_as_the_detector_alone():
    model, inputs = teacher(), whole_inputs()
    found = {}
    for branch in ("high", "low", "fused"):
        model.test_branch = branch
        found[branch] = detections(model, inputs)
    for ours, theirs in zip(found["high"], detections(model.detector, inputs)):
        assert_same_detections(ours, theirs)
    for ours, theirs in zip(found["low"], detections(low_detector(model), inputs)):
        assert_same_detections(ours, theirs)
    scores = [found[branch][0].scores[0].item() for branch in found]
    assert len(set(scores)) == 3


@pytest.mark.parametrize("branch, passes", [("fused", 2), ("high", 1), ("low", 1)])
def test_only_what_detects_is_computed(branch, passes):
    model, calls = teacher(MSAD__TEST_BRANCH=branch), Counter()
    model.backbone.register_forward_hook(lambda *_: calls.update(["backbone"]))
    model.detector.head.register_forward_hook(lambda *_: calls.update(["head"]))
    model.fusion.register_forward_hook(lambda *_: calls.update(["fusion"]))
    detections(model, batch())
    assert calls == Counter(backbone=passes, head=1, fusion=4 if branch == "fused" else 0)


def test_a_batch_of_three_gives_three_results_which_do_not_depend_on_the_batch():
    model, inputs = teacher(), [image_input(96, 128, seed=seed) for seed in range(3)]
    together = detections(model, inputs)
    assert len(together) == 3
    for each, ours in zip(inputs, together):
        assert_same_detections(ours, detections(model, [each])[0])


def test_detections_are_scaled_to_the_asked_size():
    model, inputs = teacher(), image_input(96, 128)
    [plain] = detections(model, [inputs])
    [scaled] = detections(model, [{**inputs, "height": 192, "width": 64}])
    assert plain.image_size == (96, 128) and scaled.image_size == (192, 64)
    torch.testing.assert_close(scaled.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([0.5, 2, 0.5, 2]))


# Stages.


@pytest.mark.parametrize("detector", DETECTORS)
def test_it_declares_what_the_inner_detector_declares(detector):
    staged = stage_detector(teacher(detector))
    inner = stage_detector(staged.model.detector)
    flags = ("assigns_points", "assigns_by_outputs")
    for name in ("family", "reg_max", *flags, "num_classes", "in_features", "strides", "anchors_per_cell"):
        assert getattr(staged, name) == getattr(inner, name), name
    assert staged.traits() == inner.traits() and staged.feature_shapes() == inner.feature_shapes()
    assert staged.innermost is inner.innermost is staged.model.detector
    assert staged.is_wrapper and not inner.is_wrapper
    # What an adapter of a dense detector may override it passes on, or rests on attributes that are passed on.
    own = {
        "kind", "family", "is_wrapper", "traits", "num_classes", "in_features", "feature_shapes", "strides",
        "anchors_per_cell", "score_threshold", "pixel_statistics", "device", "roi_heads", "has_roi_stages", "keep_classes", "tap_channels", "branch_of", "preprocess", "decode",
    }
    passed_on = {name for name in vars(StagedMultiScale) if not name.startswith("_")} | set(vars(staged))
    assert {name for name in dir(StagedDense) if not name.startswith("_")} <= own | passed_on


@pytest.mark.parametrize("detector", DETECTORS)
def test_boxes_are_decoded_as_by_the_inner_detector(detector):
    staged = stage_detector(teacher(detector).eval())
    inputs = batch()
    with EventStorage():
        run = staged.run(staged.preprocess(inputs), [x["instances"] for x in inputs], frozen=True)
        deltas = run.outputs["deltas"]
        assert torch.equal(staged.decode(run.grid, deltas), staged.inner.decode(run.grid, deltas))
        ours, theirs = staged.features(run.images), run.features
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_classes_are_the_inner_detectors():
    assert num_classes_key(teacher_cfg("GFL")) == "MODEL.GFL.NUM_CLASSES"
    assert num_classes_key(distiller_cfg("MultiScaleDetector", None)) == "MODEL.FCOS.NUM_CLASSES"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"MSAD__DETECTOR": "GeneralizedRCNN"}, "MODEL.MSAD.DETECTOR is 'GeneralizedRCNN', which is no one-stage"),
        ({"MSAD__DETECTOR": "MultiScaleDetector"}, "MODEL.MSAD.DETECTOR is 'MultiScaleDetector'"),
        ({"MSAD__DETECTOR": "Distiller"}, "MODEL.MSAD.DETECTOR is 'Distiller'"),
        ({"MSAD__DETECTOR": "Fcos"}, "MODEL.MSAD.DETECTOR is 'Fcos'"),
        ({"MSAD__FACTOR": 3}, "MODEL.MSAD.FACTOR is 3; choose one of 2, 4"),
        ({"MSAD__FUSION_SCORE": "mean"}, "FUSION_SCORE is 'mean'; choose from per_image, first_image"),
        ({"MSAD__TEST_BRANCH": "hr"}, "TEST_BRANCH is 'hr'; choose from high, low, fused"),
        ({"MSAD__FUSION_REDUCTION": 65}, "FUSION_REDUCTION is 65, more than the 64 channels"),
        (
            {"FPN__IN_FEATURES": STAGES[1:]},
            r"MODEL.MSAD.FACTOR 2 needs pyramid maps of stride \[4\].*has strides \[8, 16, 32, 64\]; add 'res2'",
        ),
        ({"MSAD__FACTOR": 4}, r"MODEL.MSAD.FACTOR 4 needs pyramid maps of stride \[2\]"),
        ({"FPN__TOP_BLOCK": "P6P7"}, "The pyramid of OpenMMLabFCOS has p7, which neither resolution of MODEL.MSAD"),
    ],
)
def test_configs_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        teacher(**overrides)


def test_a_low_resolution_detector_is_no_inner_detector():
    overrides = {**of_student(), "MSAD__DETECTOR": "OpenMMLabFCOS"}
    with pytest.raises(UserError, match=r"needs pyramid maps of stride \[4\]"):
        build(detector_cfg("MultiScaleDetector", **overrides))
    assert isinstance(build(detector_cfg("OpenMMLabFCOS", **of_student())).backbone, LowResolution)

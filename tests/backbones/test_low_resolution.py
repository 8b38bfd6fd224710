"""A pyramid on fewer pixels has the maps of one on all of them, in names, strides and sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from d2_distill.backbones import LowResolution
from d2_distill.backbones.low_resolution import decimate
from d2_distill.errors import UserError
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d

from ..low_resolution_pairs import LEVELS, STAGES, of_student, of_teacher
from ..small_detectors import batch, build, detector_cfg, image_input

DETECTORS = ["RetinaNet", "OpenMMLabRetinaNet", "FCOS", "OpenMMLabFCOS", "ATSS", "GFL", "GFLv2"]


def low_resolution(factor: int = 2, **overrides) -> LowResolution:
    torch.manual_seed(0)
    return build_backbone(detector_cfg("RetinaNet", **{**of_student(factor), **overrides})).eval()


@pytest.mark.parametrize("factor", [2, 4])
def test_pixels(factor):
    image = torch.rand(2, 3, 24, 40)
    small = decimate(image, factor)
    assert small.shape == (2, 3, 24 // factor, 40 // factor)
    for row in range(small.shape[2]):
        for column in range(small.shape[3]):
            assert torch.equal(small[:, :, row, column], image[:, :, factor * row, factor * column])
    assert torch.equal(small, F.interpolate(image, scale_factor=1 / factor, mode="nearest"))


@pytest.mark.parametrize("factor", [2, 4])
def test_maps_are_those_of_the_small_image(factor):
    backbone, image = low_resolution(factor), torch.rand(1, 3, 512, 256)
    with torch.no_grad():
        maps, inner = backbone(image), backbone.pyramid(image[..., ::factor, ::factor])
    assert list(maps) == list(backbone.output_shape()) == LEVELS[factor]
    assert list(inner) == ["p2", "p3", "p4", "p5"]
    for (name, shape), x, y in zip(backbone.output_shape().items(), maps.values(), inner.values()):
        assert torch.equal(x, y) and shape.stride == 2 ** int(name[1:]) and shape.channels == 32
        assert x.shape == (1, 32, 512 // shape.stride, 256 // shape.stride)


@pytest.mark.parametrize("factor", [2, 4])
def test_sizes_agree_with_a_pyramid_of_the_whole_image(factor):
    """For any image, once it is padded; only shapes are computed."""
    low = low_resolution(factor).to("meta")
    whole = build_backbone(detector_cfg("RetinaNet", **of_teacher(factor=factor))).eval().to("meta")
    for height, width in [(1, 1), (800, 1333), (257, 511), (130, 1025), (640, 383)]:
        image = torch.zeros(3, height, width, device="meta")
        padded = ImageList.from_tensors([image], low.size_divisibility).tensor
        ours, theirs = low(padded), whole(padded)
        for name, x in ours.items():
            assert x.shape == theirs[name].shape, (height, width, name)


def test_padding_is_the_published_one():
    backbone = low_resolution(FPN__TOP_BLOCK="P6")
    assert list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert backbone.train().size_divisibility == backbone.eval().size_divisibility == 256
    # The pyramid on small images itself needs multiples of 32.
    tight = low_resolution(FPN__TOP_BLOCK="P6", LOW_RESOLUTION__ALIGN_TEST=False)
    assert tight.train().size_divisibility == 256 and tight.eval().size_divisibility == 64


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("case", DETECTORS)
def test_every_detector_trains(case, factor):
    """With boxes and anchors of the whole image, and a gradient for every parameter."""
    model = build(detector_cfg(case, **of_student(factor))).train()
    with EventStorage():
        losses = model(batch())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    side = model.backbone.size_divisibility
    sides = [side // shape.stride for shape in model.backbone.output_shape().values()]
    features = [torch.zeros(1, 32, cells, cells) for cells in sides]
    anchors = model.anchor_generator(features)
    for stride, boxes in zip(model.anchor_generator.strides, anchors):
        centers = boxes.get_centers()
        assert centers.max() > side - 1.01 * stride and centers.min() >= 0


def test_detections_are_in_pixels_of_the_whole_image():
    """Of output size: twice as wide asked, twice as wide given."""
    model = build(detector_cfg("OpenMMLabFCOS", **of_student()), salt=3).eval()
    inputs = image_input(96, 128)
    wide = {**inputs, "width": 256}
    with torch.no_grad():
        [found], [stretched] = model([inputs]), model([wide])
    boxes = found["instances"].pred_boxes.tensor
    assert len(boxes) > 0 and boxes[:, 2].max() > 64 and boxes[:, 3].max() > 48
    torch.testing.assert_close(stretched["instances"].pred_boxes.tensor, boxes * torch.tensor([2.0, 1, 2, 1]))
    assert found["instances"].image_size == (96, 128)


def test_fixed_statistics_are_those_of_the_bottom_up_network():
    cfg = detector_cfg("RetinaNet", **of_student(), BACKBONE__FIXED_BN_STATISTICS=True, FPN__NORM="BN")
    pyramid = build(cfg).backbone.pyramid
    fixed = [name for name, module in pyramid.named_modules() if isinstance(module, FixedBatchNorm2d)]
    assert len(fixed) > 10 and all(name.startswith("bottom_up.") for name in fixed)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"LOW_RESOLUTION__FACTOR": 3}, "MODEL.LOW_RESOLUTION.FACTOR is 3; choose one of 2, 4"),
        (
            {"LOW_RESOLUTION__BACKBONE": "build_low_resolution_backbone"},
            "BACKBONE is 'build_low_resolution_backbone', which builds no pyramid; choose one of .*resnet_fpn",
        ),
        ({"LOW_RESOLUTION__BACKBONE": "none"}, "MODEL.LOW_RESOLUTION.BACKBONE is 'none'"),
        (
            {"FPN__IN_FEATURES": STAGES[1:], "MOBILENETV2__OUT_STAGES": (1, 2, 4, 6)},
            "gives p3, p4, p5, but a small image needs the level p2; add 'res2' to MODEL.FPN.IN_FEATURES",
        ),
        (
            {"FPN__TOP_BLOCK": "P6P7"},
            "pyramid has p7, p8, which the head of RetinaNet does not read .*MODEL.FPN.TOP_BLOCK .'P6', or ''",
        ),
    ],
)
def test_pyramids_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build(detector_cfg("RetinaNet", **{**of_student(), **overrides}))

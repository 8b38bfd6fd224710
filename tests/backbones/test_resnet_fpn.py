"""P3 to P7 with P6 on the pyramid or on C5, and with or without the ReLU in front of P7."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone

from d2_distill.config.keys import get_distill_cfg
from d2_distill.errors import UserError


def backbone_cfg(depth: int = 18, **fpn):
    cfg = get_distill_cfg()
    levels = ["res3", "res4", "res5"]
    cfg.merge_from_list([
        "MODEL.BACKBONE.NAME", "build_p3p7_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256, "MODEL.RESNETS.STRIDE_IN_1X1", False,
        "MODEL.RESNETS.OUT_FEATURES", levels, "MODEL.FPN.IN_FEATURES", levels, "MODEL.FPN.OUT_CHANNELS", 16,
    ])
    cfg.merge_from_list([item for key, value in fpn.items() for item in (f"MODEL.FPN.{key}", value)])
    return cfg


def build(*args, **fpn):
    torch.manual_seed(0)
    return build_backbone(backbone_cfg(*args, **fpn))


@pytest.mark.parametrize("depth, channels", [(18, 512), (34, 512), (50, 2048), (101, 2048)])
def test_shapes(depth, channels):
    backbone = build(depth)
    assert backbone.bottom_up.output_shape()["res5"].channels == channels
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {f"p{i}": 2**i for i in range(3, 8)}
    assert {shape.channels for shape in shapes.values()} == {16} and backbone.size_divisibility == 32
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 96, 160))  # P5 of 3 x 5 cells
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "p3": (16, 12, 20), "p4": (16, 6, 10), "p5": (16, 3, 5), "p6": (16, 2, 3), "p7": (16, 1, 2)
    }


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("in_feature", ["p5", "res5"])
def test_top_block(in_feature, relu):
    backbone = build(TOP_BLOCK_IN_FEATURE=in_feature, TOP_BLOCK_RELU=relu)
    top = backbone.top_block
    assert list(top.state_dict()) == ["p6.weight", "p6.bias", "p7.weight", "p7.bias"]
    top.p6.bias.data.uniform_(-1, 1)
    with torch.no_grad():
        image = torch.randn(2, 3, 64, 96)
        features = backbone(image)
        below = {**features, **backbone.bottom_up(image)}[in_feature]
        p6 = F.conv2d(below, top.p6.weight, top.p6.bias, stride=2, padding=1)
        p7 = F.conv2d(p6.relu() if relu else p6, top.p7.weight, top.p7.bias, stride=2, padding=1)
    assert (p6 < 0).any() and (p6 > 0).any()
    torch.testing.assert_close(features["p6"], p6)
    torch.testing.assert_close(features["p7"], p7)


def test_p6_on_p5_is_the_default_without_relu():
    found, expected = build(), build(TOP_BLOCK_IN_FEATURE="p5", TOP_BLOCK_RELU=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(image)["p7"], expected(image)["p7"])


@pytest.mark.parametrize("top_block, levels", [("P6", 4), ("", 3)])
def test_lower_pyramids_are_the_whole_ones_lower_levels(top_block, levels):
    whole, part = build(TOP_BLOCK_IN_FEATURE="res5"), build(TOP_BLOCK=top_block, TOP_BLOCK_IN_FEATURE="res5")
    state = whole.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    assert len(state) - len(part.state_dict()) == {4: 2, 3: 4}[levels]
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = part(image), whole(image)
    assert list(ours) == list(part.output_shape()) == list(theirs)[:levels]
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_max_pool_is_detectron2s_two_stage_pyramid():
    cfg = backbone_cfg(TOP_BLOCK="MaxPool")
    image = torch.rand(1, 3, 64, 96)
    found = []
    for name in ("build_p3p7_resnet_fpn_backbone", "build_resnet_fpn_backbone"):
        cfg.MODEL.BACKBONE.NAME = name
        torch.manual_seed(0)
        backbone = build_backbone(cfg)
        with torch.no_grad():
            found.append(backbone(image))
    ours, theirs = found
    assert list(ours) == list(theirs) == ["p3", "p4", "p5", "p6"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_res5_and_relu_are_detectron2s_retinanet():
    """Same names, same initialisation, same features."""
    cfg = backbone_cfg(TOP_BLOCK_IN_FEATURE="res5", TOP_BLOCK_RELU=True)
    image = torch.rand(1, 3, 64, 64)
    found = {}
    for name in ("build_p3p7_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"):
        cfg.MODEL.BACKBONE.NAME = name
        torch.manual_seed(0)
        backbone = build_backbone(cfg)
        with torch.no_grad():
            found[name] = {**backbone.state_dict(), **backbone(image)}
    ours, theirs = found.values()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "fpn, message",
    [
        ({"TOP_BLOCK_IN_FEATURE": "p4"}, "MODEL.FPN.TOP_BLOCK_IN_FEATURE is 'p4'; choose one of p5, res5"),
        ({"IN_FEATURES": ["res3", "res4"]}, r"MODEL.FPN.IN_FEATURES is .*'res4'\]; it must end with 'res5'"),
        ({"IN_FEATURES": []}, r"MODEL.FPN.IN_FEATURES is \[\]"),
        ({"IN_FEATURES": ["res3", "res5"]}, r"such as \['res3', 'res4', 'res5'\]"),
        ({"TOP_BLOCK": "P7"}, "MODEL.FPN.TOP_BLOCK is 'P7'; choose one of P6P7, P6, MaxPool, or ''"),
    ],
)
def test_pyramids_that_do_not_fit_are_refused(fpn, message):
    with pytest.raises(UserError, match=message):
        build(**fpn)

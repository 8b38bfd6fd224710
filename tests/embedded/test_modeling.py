"""Backbones, anchors, matching and one-stage detectors where the recorded numbers do not reach."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import FCOS, FPN, build_backbone, build_model, build_resnet_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BottleneckBlock
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from torch import nn

from d2_distill import provider


def config(*opts):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


def resnet18(*out_features):
    cfg = config("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
                 "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.OUT_FEATURES", list(out_features))
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def test_resnet_drops_stages_beyond_its_outputs():
    backbone = build_backbone(config("MODEL.RESNETS.OUT_FEATURES", ["stem", "res3"]))
    assert [name for name, _ in backbone.named_children()] == ["stem", "res2", "res3"]
    outputs = backbone(torch.zeros(1, 3, 32, 64))
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {"stem": (64, 4), "res3": (512, 8)}
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "stem": (1, 64, 8, 16), "res3": (1, 512, 4, 8)}
    with pytest.raises(AssertionError):
        resnet18("res9")


def test_resnet_freezes_parameters_and_batch_norms():
    backbone = build_backbone(config("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2))
    for name, module in backbone.named_modules():
        frozen = name.startswith(("stem", "res2"))
        if name.endswith("norm"):
            assert isinstance(module, FrozenBatchNorm2d if frozen else nn.BatchNorm2d), name
        elif isinstance(module, nn.Conv2d):
            assert module.weight.requires_grad is not frozen, name


def test_dilated_res5_keeps_the_stride_of_res4():
    backbone = build_backbone(config(
        "MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]))
    assert [shape.stride for shape in backbone.output_shape().values()] == [16, 16]
    outputs = backbone(torch.zeros(1, 3, 32, 32))
    assert outputs["res4"].shape[2:] == outputs["res5"].shape[2:] == (2, 2)


@pytest.mark.parametrize("stride_in_1x1, strides", [(True, (2, 1)), (False, (1, 2))])
def test_place_of_the_stride_in_a_bottleneck(stride_in_1x1, strides):
    block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2, stride_in_1x1=stride_in_1x1)
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    assert block.shortcut.stride[0] == 2


def test_fpn_fuses_top_down():
    torch.manual_seed(0)
    bottom_up = resnet18("res2", "res3").eval()
    image = torch.rand(1, 3, 64, 64)
    maps = bottom_up(image)
    for fuse_type, divisor in (("sum", 1), ("avg", 2)):
        fpn = FPN(bottom_up, ["res2", "res3"], 8, fuse_type=fuse_type).eval()
        assert fpn.size_divisibility == 8
        coarse = fpn.fpn_lateral3(maps["res3"])
        upsampled = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        fine = fpn.fpn_lateral2(maps["res2"])
        outputs = fpn(image)
        assert list(outputs) == ["p2", "p3"]
        torch.testing.assert_close(outputs["p2"], fpn.fpn_output2((fine + upsampled) / divisor))
        torch.testing.assert_close(outputs["p3"], fpn.fpn_output3(coarse))


def test_fpn_refuses_strides_that_do_not_double():
    with pytest.raises(AssertionError):
        FPN(resnet18("res2", "res4"), ["res2", "res4"], 8)


def test_permute_to_anchors():
    anchors, K, height, width = 2, 3, 2, 5
    dense = torch.arange(anchors * K * height * width).view(1, anchors * K, height, width)
    rows = permute_to_N_HWA_K(dense, K)
    assert rows.shape == (1, height * width * anchors, K)
    y, x, a = 1, 3, 1
    assert rows[0, (y * width + x) * anchors + a].tolist() == dense[0, a * K:(a + 1) * K, y, x].tolist()


def test_head_with_batch_norm_keeps_statistics_of_each_level():
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=4)] * 2, num_classes=3, num_anchors=1, conv_dims=[4], norm="BN")
    keys = [key for key in head.state_dict() if key.startswith("cls_subnet.1.")]
    assert {"cls_subnet.1.weight", "cls_subnet.1.0.running_mean", "cls_subnet.1.1.running_mean"} <= set(keys)
    head.train()
    head([torch.full((1, 4, 2, 2), 5.0), torch.zeros(1, 4, 1, 2)])
    means = [head.cls_subnet[1][level].running_mean for level in range(2)]
    assert not torch.equal(means[0], means[1])


def test_anchors_of_levels_and_their_number():
    with pytest.raises(AssertionError):
        DefaultAnchorGenerator(sizes=[[8], [16]], aspect_ratios=[[1.0]], strides=[8, 16, 32])
    generator = DefaultAnchorGenerator(sizes=[8, 16], aspect_ratios=[1.0], strides=[8, 16])
    assert list(generator.num_anchors) == [2, 2]


def test_matcher_refuses_inconsistent_arguments():
    for thresholds, labels in (([0.7, 0.3], [0, -1, 1]), ([0.5], [0, 2]), ([0.5], [0, -1, 1])):
        with pytest.raises(AssertionError):
            Matcher(thresholds, labels)


def test_pooler_gives_every_level_a_gradient():
    features = [torch.rand(1, 2, 32 >> i, 32 >> i, requires_grad=True) for i in range(2)]
    pooler = ROIPooler(2, (1 / 4, 1 / 8), 0, "ROIAlignV2")
    pooler(features, [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))]).sum().backward()
    assert features[0].grad.abs().sum() > 0
    assert torch.equal(features[1].grad, torch.zeros_like(features[1]))
    with pytest.raises(AssertionError):
        ROIPooler(2, (1 / 4, 1 / 16), 0, "ROIAlignV2")


def tiny_fcos():
    return FCOS(
        backbone=FPN(resnet18("res3", "res4"), ["res3", "res4"], 8),
        head=FCOSHead(input_shape=[ShapeSpec(channels=8)] * 2, num_classes=3, conv_dims=[8]),
        num_classes=3,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )


def test_fcos_assignment():
    model = tiny_fcos()
    assert model.head_in_features == ["p3", "p4"]
    anchors = model.anchor_generator([torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)])
    # a small box within a large one, both centred at (20, 20), where pixel (2, 2) of P3 lies
    boxes = Boxes(torch.tensor([[4.0, 4.0, 36.0, 36.0], [10.0, 10.0, 30.0, 30.0]]))
    labels, matched = model.label_anchors(
        anchors, [Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([0, 2])),
                  Instances((64, 64), gt_boxes=boxes[:0], gt_classes=torch.zeros(0, dtype=torch.int64))])
    p3 = labels[0][:64].view(8, 8)
    assert p3[2, 2] == 2 and matched[0][2 * 8 + 2].tolist() == [10.0, 10.0, 30.0, 30.0]
    # within 1.5 strides (12 pixels) of the centre in both axes: the 3 x 3 pixels around
    assert (p3 != 3).nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]
    assert (labels[0][64:] == 3).all() and (labels[1] == 3).all()
    centerness = model.compute_ctrness_targets(anchors, matched)
    assert centerness[0, 2 * 8 + 2] == 1


@pytest.mark.skipif(provider.name() == "real", reason="the installed Detectron2 has these features")
def test_features_left_out_are_named():
    for key, value in (("TEST.PRECISE_BN.ENABLED", True), ("VIS_PERIOD", 20)):
        with pytest.raises(NotImplementedError, match=key):
            build_model(config(key, value))


def test_unknown_architecture_is_named():
    with pytest.raises(KeyError, match="NoSuchNet"):
        build_model(config("MODEL.META_ARCHITECTURE", "NoSuchNet"))

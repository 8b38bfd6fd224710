"""The head of the one-stage detectors: its parameters, their start, and what runs through them."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from d2_distill.detectors.head import QualityHead, TowerHead

LEVELS = 5


def _shapes(channels: int, levels: int = LEVELS):
    return [ShapeSpec(channels=channels, stride=8 * 2**level) for level in range(levels)]


def _head(channels: int = 8, convs: int = 2, **options) -> TowerHead:
    arguments = {"num_scores": 3, "box_dim": 4, "conv_dims": [channels] * convs, **options}
    return TowerHead(input_shape=_shapes(channels), **arguments)


def _quality_head(channels: int = 32, convs: int = 1, **options) -> QualityHead:
    arguments = {"num_scores": 4, "norm": "GN", "conv_dims": [channels] * convs, **options}
    return QualityHead(
        input_shape=_shapes(channels), reg_max=16, quality_topk=4, quality_channels=64, **arguments
    )


def _count(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def test_published_parameter_counts():
    """GFL and GFLv2 on COCO (recorded from the reference)."""
    assert _count(_head(256, 4, num_scores=80, box_dim=68, norm="GN")) == 5_063_833
    assert _count(_quality_head(256, 4, num_scores=81)) == 5_067_547


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_initial_values(prior):
    torch.manual_seed(0)
    head = _quality_head(64, 3, prior_prob=prior, centerness_on="cls", num_scores=20)
    state = head.state_dict()
    for name, value in state.items():
        if name == "cls_score.bias":
            assert value.tolist() == pytest.approx([math.log(prior / (1 - prior))] * 20)
        elif value.dim() >= 2:
            assert abs(value.mean()) < 4 * 0.01 / value.numel() ** 0.5
            assert value.std().item() == pytest.approx(0.01, rel=4 / (2 * value.numel()) ** 0.5)
        elif name.endswith("bias"):
            assert not value.any()
        else:  # group norms and scales
            assert (value == 1).all()
    assert not [name for name in state if "subnet.0" in name and name.endswith("bias")]


@pytest.mark.parametrize("norm, block", [("", 2), ("GN", 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_names(norm, block, bias):
    head = _head(32, norm=norm, tower_bias=bias, centerness_on="box")
    expected = {"ctrness.weight", "ctrness.bias", *(f"scales.{level}.scale" for level in range(LEVELS))}
    for name in ("cls_score", "bbox_pred"):
        expected |= {f"{name}.weight", f"{name}.bias"}
    for tower in ("cls_subnet", "bbox_subnet"):
        for conv in range(2):
            expected |= {f"{tower}.{block * conv}.weight"}
            expected |= {f"{tower}.{block * conv}.bias"} if bias else set()
            if norm:
                expected |= {f"{tower}.{block * conv + 1}.weight", f"{tower}.{block * conv + 1}.bias"}
    assert set(head.state_dict()) == expected


def test_predictors_without_bias():
    """All but that of the classes, whose bias holds the prior."""
    state = _head(centerness_on="box", predictor_bias=False).state_dict()
    assert [name for name in state if "subnet" not in name and name.endswith("bias")] == ["cls_score.bias"]


def test_a_norm_may_be_a_function():
    head = _head(norm=lambda channels: nn.GroupNorm(4, channels))
    assert head.cls_subnet[1].num_groups == 4


@pytest.mark.parametrize("centerness_on", [None, "cls", "box"])
@pytest.mark.parametrize("use_scale", [False, True])
def test_forward(centerness_on, use_scale):
    """Against the layers one by one; each level has its own scale."""
    torch.manual_seed(1)
    head = _head(num_anchors=2, centerness_on=centerness_on, use_scale=use_scale, tower_bias=True)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    features = [torch.randn(2, 8, 6 - level, 7 - level) for level in range(LEVELS)]
    outputs = head(features)
    assert len(outputs) == len(head.predictors) == (3 if centerness_on else 2)
    assert list(head.predictors) == ["logits", "deltas", "centerness"][: len(outputs)]
    for level, x in enumerate(features):
        classes, boxes = x, x
        for layer in head.cls_subnet:
            classes = layer(classes)
        for layer in head.bbox_subnet:
            boxes = layer(boxes)
        deltas = head.bbox_pred(boxes)
        if use_scale:
            deltas = deltas * head.scales[level].scale
        assert torch.equal(outputs[0][level], head.cls_score(classes))
        assert torch.equal(outputs[1][level], deltas)
        assert outputs[0][level].shape[1:] == (6, *x.shape[2:])
        assert outputs[1][level].shape[1:] == (8, *x.shape[2:])
        if centerness_on:
            end = classes if centerness_on == "cls" else boxes
            assert torch.equal(outputs[2][level], head.ctrness(end))
            assert outputs[2][level].shape[1:] == (2, *x.shape[2:])


def test_a_head_without_towers():
    head = _head(convs=0)
    features = [torch.randn(1, 8, 3, 4) for _ in range(LEVELS)]
    assert torch.equal(head(features)[0][2], head.cls_score(features[2]))


def test_channels_of_the_blocks_may_differ():
    head = _head(8, conv_dims=[16, 24])
    assert [layer.out_channels for layer in head.cls_subnet if isinstance(layer, nn.Conv2d)] == [16, 24]
    assert head.bbox_pred.in_channels == 24
    assert head([torch.randn(1, 8, 3, 4)] * LEVELS)[1][4].shape == (1, 4, 3, 4)


def test_quality_against_a_loop():
    torch.manual_seed(2)
    head = _quality_head().double()
    for parameter in head.reg_conf.parameters():
        nn.init.normal_(parameter, std=0.5)
    deltas = torch.randn(2, 3, 68, dtype=torch.float64) * 2
    quality = head.quality(deltas)
    assert quality.shape == (2, 3, 1)
    first, _, last = head.reg_conf
    for image in range(2):
        for row in range(3):
            statistics = []
            for edge in range(4):
                logits = deltas[image, row, 17 * edge : 17 * edge + 17].tolist()
                weights = [math.exp(x) for x in logits]
                highest = sorted((w / sum(weights) for w in weights), reverse=True)[:4]
                statistics += [*highest, sum(highest) / 4]
            hidden = [
                max(sum(w * x for w, x in zip(weight.tolist(), statistics)) + bias.item(), 0)
                for weight, bias in zip(first.weight, first.bias)
            ]
            logit = sum(w * x for w, x in zip(last.weight[0].tolist(), hidden)) + last.bias.item()
            assert quality[image, row].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-9)


def test_quality_teaches_the_boxes():
    head = _quality_head()
    for parameter in head.reg_conf.parameters():
        nn.init.normal_(parameter, std=0.5)
    deltas = torch.randn(5, 68, requires_grad=True)
    head.quality(deltas).sum().backward()
    assert deltas.grad.any(dim=1).all()
    assert head.quality(torch.zeros(0, 68)).shape == (0, 1)

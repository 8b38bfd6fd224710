"""Deformable layers of either Detectron2 and ours, against a loop over points that are read one by one."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import DeformConv, FrozenBatchNorm2d, ModulatedDeformConv, ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import nn

from d2_distill.layers.deformable import DeformableConv2d, move_to_torchvision


def read(plane: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Interpolate (H, W) at a place of one cell's units; beside the plane there are zeros."""
    height, width = plane.shape
    total = plane.new_zeros(())
    top, left = math.floor(y.item()), math.floor(x.item())
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + plane[row, column] * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return total


def slow(x, offset, mask, weight, bias, *, stride, padding, dilation, deformable_groups):
    """The equation of both papers, for each output value."""
    channels_out, per_group, side, _ = weight.shape
    per_offsets = x.shape[1] // deformable_groups
    outputs = []
    for image in range(len(x)):
        for channel in range(channels_out):
            first = channel // (channels_out * per_group // x.shape[1]) * per_group
            for row in range(offset.shape[2]):
                for column in range(offset.shape[3]):
                    value = x.new_zeros(()) if bias is None else bias[channel]
                    for source in range(first, first + per_group):
                        group = source // per_offsets
                        for point in range(side**2):
                            place = (group * side**2 + point) * 2
                            shift = offset[image, place : place + 2, row, column]
                            y = row * stride - padding + point // side * dilation + shift[0]
                            z = column * stride - padding + point % side * dilation + shift[1]
                            factor = 1 if mask is None else mask[image, group * side**2 + point, row, column]
                            kernel = weight[channel, source - first, point // side, point % side]
                            value = value + kernel * factor * read(x[image, source], y, z)
                    outputs.append(value)
    return torch.stack(outputs).view(len(x), channels_out, *offset.shape[2:])


GEOMETRIES = [
    {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "deformable_groups": 1},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "deformable_groups": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layer", [DeformConv, ModulatedDeformConv])
def test_against_the_equation(layer, geometry):
    """Outputs and all gradients."""
    torch.manual_seed(0)
    modulated = layer is ModulatedDeformConv
    conv = layer(4, 2, 3, **geometry, bias=modulated).double()
    if modulated:
        conv.bias.data.uniform_(-1, 1)
    move_to_torchvision(conv)
    x = torch.randn(2, 4, 4, 3, dtype=torch.double)
    border = 2 * geometry["padding"] - 2 * geometry["dilation"]
    out = tuple((side + border - 1) // geometry["stride"] + 1 for side in (4, 3))
    offset = torch.randn(2, 2 * 9 * geometry["deformable_groups"], *out, dtype=torch.double)
    inputs = [x, offset, *[torch.rand(2, 9 * geometry["deformable_groups"], *out, dtype=torch.double)] * modulated]
    for value in inputs:
        value.requires_grad_()
    leaves = [*inputs, *conv.parameters()]

    found = conv(*inputs)
    upstream = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, leaves, upstream)
    kept = {name: geometry[name] for name in ("stride", "padding", "dilation", "deformable_groups")}
    expected = slow(x, offset, inputs[2] if modulated else None, conv.weight, conv.bias, **kept)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(found_gradients, torch.autograd.grad(expected, leaves, upstream)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer, names", [(DeformConv, ["weight"]), (ModulatedDeformConv, ["weight", "bias"])])
def test_names_arguments_and_what_follows(layer, names):
    conv = layer(4, 8, kernel_size=3, padding=1)
    assert list(conv.state_dict()) == names
    conv = layer(4, 8, 3, padding=1, bias=False, norm=FrozenBatchNorm2d(8), activation=torch.relu)
    move_to_torchvision(conv)
    conv.norm.bias += 0.1
    x, offset = torch.randn(1, 4, 5, 5), torch.zeros(1, 18, 5, 5)
    inputs = (x, offset) if layer is DeformConv else (x, offset, torch.full((1, 9, 5, 5), 0.5))
    plain = torch.conv2d(x, conv.weight, padding=1) * (1 if layer is DeformConv else 0.5)
    torch.testing.assert_close(conv(*inputs), torch.relu(plain + 0.1))
    assert "deformable_groups=1" in repr(conv)


def test_no_bias_in_version_1():
    with pytest.raises(AssertionError):
        DeformConv(4, 8, 3, bias=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
def test_in_the_place_of_a_plain_convolution(modulated, groups):
    """The same layer as Detectron2's with its convolution of offsets; at first the plain one, halved in version 2."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=False)
    conv = DeformableConv2d.like(plain, modulated=modulated)
    assert set(conv.state_dict()) == {"weight", "conv_offset.weight", "conv_offset.bias"}
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(conv(x), plain(x) * (0.5 if modulated else 1))

    nn.init.normal_(conv.conv_offset.weight)
    layer = (ModulatedDeformConv if modulated else DeformConv)(4, 6, 3, stride=2, padding=1, groups=groups, bias=False)
    move_to_torchvision(layer)
    layer.load_state_dict({"weight": plain.weight})
    maps = conv.conv_offset(x)
    inputs = (maps[:, :18], maps[:, 18:].sigmoid()) if modulated else (maps,)
    torch.testing.assert_close(conv(x), layer(x, *inputs))


@pytest.mark.parametrize("modulated", [False, True])
def test_half_precision(modulated):
    """In autocast the maps are of half precision, the weights are not."""
    conv = DeformableConv2d(4, 6, 3, padding=1, modulated=modulated)
    layer = (ModulatedDeformConv if modulated else DeformConv)(4, 6, 3, padding=1, bias=False)
    move_to_torchvision(layer)
    x = torch.randn(1, 4, 6, 6)
    maps = torch.randn(1, 27 if modulated else 18, 6, 6).bfloat16()
    inputs = (maps[:, :18], maps[:, 18:]) if modulated else (maps,)
    with torch.autocast("cpu", torch.bfloat16):
        for output in (conv(x), layer(x.bfloat16(), *inputs)):
            output.sum().backward()
            assert torch.isfinite(output).all()
    assert layer.weight.grad.abs().sum() > 0 and conv.conv_offset.weight.grad.abs().sum() > 0


def resnet(**overrides):
    cfg = get_cfg()
    values = {"OUT_FEATURES": ["res3", "res5"], "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 2,
              "NUM_GROUPS": 2, "NORM": "BN", **overrides}
    opts = [item for key, value in values.items() for item in (f"MODEL.RESNETS.{key}", value)]
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 2, *opts])
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    move_to_torchvision(model)
    return model


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("modulated, groups, channels", [(False, 1, 18), (False, 2, 36), (True, 1, 27), (True, 2, 54)])
def test_stages_of_a_resnext(modulated, groups, channels, stride_in_1x1):
    """Names and shapes as of the real one, which this test runs on, too; offsets of zeros are the plain network's."""
    torch.manual_seed(0)
    options = {"STRIDE_IN_1X1": stride_in_1x1, "RES5_DILATION": 2}
    plain = resnet(**options)
    deformable = resnet(
        **options, DEFORM_ON_PER_STAGE=[False, False, True, True], DEFORM_MODULATED=modulated, DEFORM_NUM_GROUPS=groups
    )
    state = deformable.state_dict()
    added = {name: value for name, value in state.items() if name not in plain.state_dict()}
    blocks = [f"res4.{index}" for index in range(6)] + [f"res5.{index}" for index in range(3)]
    assert set(added) == {f"{block}.conv2_offset.{name}" for block in blocks for name in ("weight", "bias")}
    assert all(len(value) == channels and not value.any() for value in added.values())
    assert state["res4.0.conv2.weight"].shape == (16, 8, 3, 3)
    block = deformable.res4[0]
    assert (block.conv1.stride[0], block.conv2_offset.stride[0]) == ((2, 1) if stride_in_1x1 else (1, 2))
    assert deformable.res5[0].conv2.dilation in (2, (2, 2)) and deformable.res5[0].conv2_offset.dilation == (2, 2)

    deformable.load_state_dict({**state, **plain.state_dict()})
    if modulated:  # factors of 1, up to rounding
        for name in added:
            if name.endswith("bias"):
                deformable.get_parameter(name).data[2 * channels // 3 :] = 40.0
    image = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        for name, expected in plain.eval()(image).items():
            torch.testing.assert_close(deformable.eval()(image)[name], expected, rtol=1e-4, atol=1e-5)
    deformable.train()(image)["res5"].sum().backward()
    for name, parameter in deformable.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_basic_blocks_have_none():
    with pytest.raises(AssertionError):
        resnet(DEPTH=18, NUM_GROUPS=1, RES2_OUT_CHANNELS=64, DEFORM_ON_PER_STAGE=[False, False, True, True])

"""MobileNetV2: torchvision's weights and features, its options, what is frozen and what is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2_distill.errors import UserError
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d

from .torchvision_trunks import (
    assert_channels_last_computes_the_same,
    assert_every_parameter_is_trained,
    diversify,
    frozen_layers,
    retinanet_cfg,
    trunk,
)

BUILDER = "build_mobilenet_v2_fpn_backbone"
# Layers of torchvision's ``features`` in front of which res3, res4, res5 are, and their channels.
TAPS = {"res3": 7, "res4": 14, "res5": 19}
CHANNELS = {"res3": 32, "res4": 96, "res5": 1280}


def mobilenet_v2(**options) -> nn.Module:
    return trunk(BUILDER, **{f"MOBILENETV2__{key}": value for key, value in options.items()})


def load(ours: nn.Module, theirs: nn.Module) -> None:
    """All tensors of torchvision's trunk by name; those of layers that ours lacks are left over."""
    state_dict = theirs.features.state_dict()
    result = ours.features.load_state_dict(state_dict, strict=False)
    assert not result.missing_keys
    assert {int(name.partition(".")[0]) for name in result.unexpected_keys}.isdisjoint(range(len(ours.features)))


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (47, 130)])
def test_features_are_those_of_torchvision(size):
    torch.manual_seed(0)
    theirs = diversify(torchvision.models.mobilenet_v2()).eval()
    ours = mobilenet_v2().eval()
    load(ours, theirs)
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        features = ours(image)
        assert list(features) == list(TAPS)
        for (name, feature), shape in zip(features.items(), ours.output_shape().values()):
            assert torch.equal(feature, theirs.features[: TAPS[name]](image)), name
            assert shape.channels == feature.shape[1] == CHANNELS[name]
            assert feature.shape[-2:] == tuple(-(-side // shape.stride) for side in size)


def test_width_and_stages():
    ours = mobilenet_v2(WIDTH_MULT=0.5, OUT_STAGES=(1, 2, 3, 6))
    theirs = torchvision.models.mobilenet_v2(width_mult=0.5)
    load(ours, theirs)
    channels = {name: shape.channels for name, shape in ours.output_shape().items()}
    assert channels == {"res3": 16, "res4": 32, "res5": 160}
    assert len(ours.features) == 18  # the last convolution is dropped: nobody reads it
    theirs.eval(), ours.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(image)["res4"], theirs.features[:11](image))
        assert torch.equal(ours(image)["res5"], theirs.features[:18](image))


def test_leaky_relu_takes_the_place_of_every_activation():
    torch.manual_seed(0)
    leaky, plain = mobilenet_v2(ACTIVATION="LeakyReLU"), mobilenet_v2()
    number = sum(isinstance(module, nn.ReLU6) for module in plain.modules())
    activations = [module for module in leaky.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(activations) == number == 35 and {module.negative_slope for module in activations} == {0.1}
    assert not any(isinstance(module, nn.ReLU6) for module in leaky.modules())
    assert list(leaky.state_dict()) == list(plain.state_dict())


def test_same_padding_is_tensorflows():
    """On even sizes a row at the bottom and a column at the right; on odd sizes all sides, as torchvision."""
    torch.manual_seed(0)
    same, plain = diversify(mobilenet_v2(SAME_PADDING=True)).eval(), mobilenet_v2().eval()
    plain.load_state_dict(same.state_dict())
    strided = [module for module in same.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert len(strided) == 5
    for conv in strided:
        for height, width in ((8, 6), (7, 5), (8, 5)):
            x = torch.randn(1, conv.in_channels, height, width)
            rows, columns = ((1 - side % 2) for side in (height, width))
            padded = F.pad(x, (1 - columns, 1, 1 - rows, 1))
            slow = F.conv2d(padded, conv.weight, stride=2, groups=conv.groups)
            with torch.no_grad():
                assert torch.equal(conv(x), slow) and slow.shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = same(image)["res3"], plain(image)["res3"]
    assert ours.shape == theirs.shape and not torch.allclose(ours, theirs)


def test_same_padding_far_from_the_border_is_a_shift():
    """Stride-2 kernels that start one pixel later see what torchvision's see of an image moved by one pixel."""
    torch.manual_seed(0)
    same, plain = diversify(mobilenet_v2(SAME_PADDING=True)).eval(), mobilenet_v2().eval()
    plain.load_state_dict(same.state_dict())
    image = torch.rand(1, 3, 256, 256)
    first = slice(0, 2)  # the stem only: the deeper, the wider the border
    with torch.no_grad():
        ours = same.features[first](image)
        theirs = plain.features[first](F.pad(image, (-1, 1, -1, 1)))
    torch.testing.assert_close(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3])


@pytest.mark.parametrize("freeze_at, layers", [(0, 0), (1, 2), (2, 4), (3, 7), (5, 19)])
def test_freezing(freeze_at, layers):
    model = trunk(BUILDER, BACKBONE__FREEZE_AT=freeze_at)
    assert frozen_layers(model) == list(range(layers))
    for index, layer in enumerate(model.features):
        norms = [type(m) for m in layer.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        assert set(norms) == {FrozenBatchNorm2d if index < layers else nn.BatchNorm2d}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"BACKBONE__FREEZE_AT": 2, "BACKBONE__FIXED_BN_STATISTICS": True},
        {"MOBILENETV2__NORM": "FrozenBN", "MOBILENETV2__ACTIVATION": "LeakyReLU"},
        {"MOBILENETV2__OUT_STAGES": (1, 2, 4, 5), "MOBILENETV2__SAME_PADDING": True},
    ],
)
def test_every_parameter_is_trained(options):
    assert_every_parameter_is_trained(retinanet_cfg(BUILDER, **options))


def test_fixed_statistics():
    model = trunk(BUILDER, BACKBONE__FREEZE_AT=1, BACKBONE__FIXED_BN_STATISTICS=True)
    kinds = {type(m) for m in model.features[2:].modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {FixedBatchNorm2d}


def test_channels_last():
    torch.manual_seed(0)
    assert_channels_last_computes_the_same(diversify(mobilenet_v2()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MOBILENETV2__NORM": "GN"}, "MODEL.MOBILENETV2.NORM is 'GN'; choose one of BN, SyncBN, FrozenBN"),
        ({"MOBILENETV2__ACTIVATION": "ReLU"}, "MOBILENETV2.ACTIVATION is 'ReLU'; choose one of ReLU6, LeakyReLU"),
        ({"MOBILENETV2__OUT_STAGES": (1, 2, 3)}, r"MODEL.MOBILENETV2.OUT_STAGES is \(1, 2, 3\); choose four"),
        ({"MOBILENETV2__OUT_STAGES": (0, 2, 4, 8)}, r"OUT_STAGES is \(0, 2, 4, 8\); choose four"),
        ({"FPN__IN_FEATURES": ["res4"]}, r"MODEL.FPN.IN_FEATURES is \['res4'\]; it must end with 'res5'"),
        ({"PIXEL_MEAN": [128.0], "PIXEL_STD": [1.0]}, "MODEL.PIXEL_MEAN has 1 entries"),
        (
            {"MOBILENETV2__NORM": "FrozenBN", "BACKBONE__FIXED_BN_STATISTICS": True},
            "no batch norm .*MODEL.MOBILENETV2.NORM",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        trunk(BUILDER, **options)

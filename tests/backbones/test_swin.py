"""Swin Transformer: torchvision's weights and features, Detectron2's own, what is frozen and what is trained."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from d2_distill import provider
from d2_distill.errors import UserError

from .torchvision_trunks import (
    assert_channels_last_computes_the_same,
    assert_every_parameter_is_trained,
    diversify,
    frozen_layers,
    retinanet_cfg,
    trunk,
)

BUILDER = "build_swin_fpn_backbone"
# Layers of torchvision's ``features`` in front of which the features are.
TAPS = {"res2": 2, "res3": 4, "res4": 6, "res5": 8}
# Small enough for tests; one more block in res4 than elsewhere.
SMALL = {"SWIN__EMBED_DIM": 12, "SWIN__DEPTHS": [2, 2, 3, 2], "SWIN__NUM_HEADS": [1, 2, 3, 4], "SWIN__WINDOW_SIZE": 4}


def small_swin(**options) -> nn.Module:
    return trunk(BUILDER, **{**SMALL, **options})


def small_torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[2, 2, 3, 2], num_heads=[1, 2, 3, 4], window_size=[4, 4],
        stochastic_depth_prob=0.2,
    )


def has_detectron2s_swin() -> bool:
    try:
        import timm  # noqa: F401
    except ImportError:
        return False
    return provider.name() == "real"


@pytest.mark.parametrize("size", [(64, 96), (192, 160), (68, 100), (84, 131)])
def test_features_are_those_of_torchvision(size):
    torch.manual_seed(0)
    theirs = diversify(small_torchvision_swin()).eval()
    ours = diversify(small_swin(FPN__IN_FEATURES=list(TAPS))).eval()
    ours.features.load_state_dict(theirs.features.state_dict())
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        features = ours(image)
        assert list(features) == list(TAPS)
        for (name, feature), shape in zip(features.items(), ours.output_shape().values()):
            tap = theirs.features[: TAPS[name]](image)  # (N, H, W, C)
            norm = ours.norms[name]
            expected = F.layer_norm(tap, tap.shape[-1:], norm.weight, norm.bias, eps=1e-5)
            torch.testing.assert_close(feature, expected.permute(0, 3, 1, 2))
            # Patches that do not fill the image are cut off, after that sizes are rounded up.
            cells = tuple(-(-(side // 4) // (shape.stride // 4)) for side in size)
            assert feature.shape == (2, shape.channels, *cells)


def test_swin_t_is_the_default():
    with torch.device("meta"):
        theirs = torchvision.models.swin_t()
    model = trunk(BUILDER)
    shapes = model.output_shape()
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        "res3": (192, 8), "res4": (384, 16), "res5": (768, 32)
    }
    ours = model.features.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.features.state_dict().items()
    }
    drop_path = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    expected = [m.p for m in theirs.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert drop_path == expected and max(drop_path) == 0.2


def test_only_the_features_wanted_have_a_norm():
    model = small_swin()
    assert {name: norm.normalized_shape for name, norm in model.norms.items()} == {
        "res3": (24,), "res4": (48,), "res5": (96,)
    }
    for norm in model.norms.values():  # starts as the plain normalisation
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()


@pytest.mark.parametrize("freeze_at, layers, norms", [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 4, 1), (5, 8, 3)])
def test_freezing(freeze_at, layers, norms):
    model = small_swin(BACKBONE__FREEZE_AT=freeze_at)
    assert frozen_layers(model) == list(range(layers))
    assert [norm.weight.requires_grad for norm in model.norms.values()] == [False] * norms + [True] * (3 - norms)
    for index, layer in enumerate(model.features):
        drops = [m.p for m in layer.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
        assert (index >= layers and index % 2 == 1 and max(drops) > 0) or not any(drops)


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_every_parameter_is_trained(freeze_at):
    assert_every_parameter_is_trained(retinanet_cfg(BUILDER, BACKBONE__FREEZE_AT=freeze_at, **SMALL))


def test_drop_path_is_for_training_only():
    torch.manual_seed(0)
    model, image = small_swin(SWIN__DROP_PATH_RATE=0.9), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        first, second = (model.train()(image)["res5"] for _ in range(2))
        third, fourth = (model.eval()(image)["res5"] for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(third, fourth)


def test_channels_last():
    torch.manual_seed(0)
    assert_channels_last_computes_the_same(diversify(small_swin()))


def detectron2_name(name: str) -> str:
    """Of a tensor of torchvision's: the name in Detectron2's Swin Transformer."""
    _, layer, rest = name.split(".", 2)
    if layer == "0":
        return "patch_embed." + {"0": "proj", "2": "norm"}[rest[0]] + rest[1:]
    stage, merging = divmod(int(layer) - 1, 2)
    if merging:
        return f"layers.{stage}.downsample.{rest}"
    rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    return f"layers.{stage}.blocks.{rest}"


@pytest.mark.skipif(not has_detectron2s_swin(), reason="needs a real Detectron2 and timm")
@pytest.mark.parametrize("size", [(256, 256), (288, 224)])
def test_both_implementations_agree(size):
    """On maps larger than a window; window and padding meet at the coarser levels of the second size."""
    torch.manual_seed(0)
    ours = diversify(small_swin()).eval()
    theirs = small_swin(SWIN__IMPLEMENTATION="detectron2").eval()
    state_dict = {}
    for name, value in ours.state_dict().items():
        if name.startswith("norms."):
            level, leaf = re.fullmatch(r"norms\.res(\d)\.(\w+)", name).groups()
            state_dict[f"norm{int(level) - 2}.{leaf}"] = value
        elif name.endswith("relative_position_index"):
            state_dict[detectron2_name(name)] = value.view(16, 16)
        else:
            state_dict[detectron2_name(name)] = value
    theirs.swin.load_state_dict(state_dict)
    assert theirs.output_shape() == ours.output_shape()
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected, found = ours(image), theirs(image)
    assert list(found) == list(expected)
    for name, feature in expected.items():
        torch.testing.assert_close(found[name], feature, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_detectron2s_swin(), reason="needs a real Detectron2 and timm")
@pytest.mark.parametrize("freeze_at", [0, 1, 2])
def test_detectron2s_own_is_trained(freeze_at):
    cfg = retinanet_cfg(BUILDER, BACKBONE__FREEZE_AT=freeze_at, SWIN__IMPLEMENTATION="detectron2", **SMALL)
    assert_every_parameter_is_trained(cfg)
    model = trunk(BUILDER, BACKBONE__FREEZE_AT=freeze_at, SWIN__IMPLEMENTATION="detectron2", **SMALL).swin
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == [set(), {"patch_embed"}, {"patch_embed", "layers"}][freeze_at]
    assert model.layers[1].blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.skipif(has_detectron2s_swin(), reason="Detectron2's Swin is there")
def test_detectron2s_own_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="MODEL.SWIN.IMPLEMENTATION is 'detectron2', which needs a real Detectron2"):
        small_swin(SWIN__IMPLEMENTATION="detectron2")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"SWIN__IMPLEMENTATION": "timm"}, "IMPLEMENTATION is 'timm'; choose one of torchvision, detectron2"),
        ({"SWIN__DEPTHS": [2, 2]}, r"MODEL.SWIN.DEPTHS is \[2, 2\] .* give four stages"),
        ({"FPN__IN_FEATURES": ["res4"]}, r"MODEL.FPN.IN_FEATURES is \['res4'\]; it must end with 'res5'"),
        ({"PIXEL_MEAN": [128.0], "PIXEL_STD": [1.0]}, "MODEL.PIXEL_MEAN has 1 entries"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        small_swin(**options)

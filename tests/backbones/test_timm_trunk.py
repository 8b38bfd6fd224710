"""Networks of timm below a pyramid: their features, names, norms, freezing and deformable convolutions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2_distill.errors import UserError
from d2_distill.layers.deformable import DeformableConv2d
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d

from ..small_detectors import build
from .torchvision_trunks import (
    assert_channels_last_computes_the_same,
    assert_every_parameter_is_trained,
    diversify,
    retinanet_cfg,
    trunk,
)

timm = pytest.importorskip("timm", reason="timm is an extra of setup.py")

BUILDER = "build_timm_fpn_backbone"
ALL = ["res2", "res3", "res4", "res5"]
# With activations in the norms; with others between; without batch norms; ResNet; blocks in classes of their own.
NETWORKS = ["mobilenetv3_small_050", "mobilenetv4_conv_small", "convnext_atto", "resnet10t", "regnetx_002"]


def network(name: str, **overrides) -> nn.Module:
    return trunk(BUILDER, TIMM__NAME=name, **overrides)


def classifier_maps(name: str, model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comes out of the classifier's modules that it names for strides of 4 to 32."""
    maps: dict[str, torch.Tensor] = {}
    modules = {info["reduction"]: info["module"] for info in model.feature_info}
    for level in range(2, 6):
        module = model.get_submodule(modules[2**level])
        module.register_forward_hook(lambda _, __, output, key=f"res{level}": maps.__setitem__(key, output.clone()))
    with torch.no_grad():
        model(image)
    return maps


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_classifier(name):
    """By the classifier's tensors, which fill the network completely."""
    torch.manual_seed(0)
    classifier = diversify(timm.create_model(name)).eval()
    model = network(name, FPN__IN_FEATURES=ALL).eval()
    state = model.from_classifier(classifier.state_dict())
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = model(image)
    expected = classifier_maps(name, classifier, image)
    assert list(found) == ALL
    for key, shape in model.output_shape().items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5 * scale)
        assert found[key].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_a_pyramid_of_fewer_levels_drops_nothing_that_it_needs():
    names = set(network("mobilenetv3_small_050").state_dict())
    assert names == set(network("mobilenetv3_small_050", FPN__IN_FEATURES=ALL).state_dict())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "resnet10t"])
@pytest.mark.parametrize(
    "options, kind",
    [
        ({"TIMM__NORM": "FrozenBN"}, FrozenBatchNorm2d),
        ({"TIMM__NORM": "SyncBN"}, nn.BatchNorm2d),  # which is what it is on a CPU
        ({"BACKBONE__FIXED_BN_STATISTICS": True}, FixedBatchNorm2d),
        ({"BACKBONE__FREEZE_AT": 5}, FrozenBatchNorm2d),
    ],
)
def test_other_norms_compute_the_same(name, options, kind):
    """Activations that timm has in its batch norms stay, and names and running statistics do."""
    torch.manual_seed(0)
    plain = diversify(network(name)).eval()
    model = network(name, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    assert norms and all(isinstance(norm, kind) for norm in norms)
    image = torch.randn(2, 3, 64, 64)
    model.train(kind in (FrozenBatchNorm2d, FixedBatchNorm2d))
    with torch.no_grad():
        for key, expected in plain(image).items():
            torch.testing.assert_close(model(image)[key], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    counters = {key for key in plain.state_dict() if key.endswith("num_batches_tracked")}
    assert set(model.state_dict()) | counters == set(plain.state_dict())


@pytest.mark.parametrize(
    "name, freeze_at, last",
    [
        ("mobilenetv3_small_050", 1, "body.bn1"),
        ("mobilenetv3_small_050", 2, "body.blocks.0."),
        ("efficientnet_lite0", 2, "body.blocks.1."),
        ("convnext_atto", 1, "body.stem_1."),
        ("convnext_atto", 3, "body.stages_1."),
        ("resnet10t", 2, "body.layer1."),
    ],
)
def test_freezing(name, freeze_at, last):
    """The stages up to one, and all in them; none after it."""
    model = network(name, BACKBONE__FREEZE_AT=freeze_at, TIMM__DROP_PATH_RATE=0.5)
    trainable = [p.requires_grad for p in model.parameters()]
    assert trainable == sorted(trainable) and any(trainable)
    everything = [key for key, _ in network(name, BACKBONE__FREEZE_AT=0).named_parameters()]
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    frozen = [key for key in everything if key not in trained]
    assert frozen[-1].startswith(last) and everything[: len(frozen)] == frozen
    rates = [getattr(module, "drop_prob", None) for module in model.modules()]
    assert 0.4 < max(rate for rate in rates if rate is not None) <= 0.5
    if (name, freeze_at) == ("convnext_atto", 3):
        assert not any(getattr(m, "drop_prob", 0) for stage in (0, 1) for m in model.body[f"stages_{stage}"].modules())


@pytest.mark.parametrize(
    "name, options",
    [
        ("mobilenetv4_conv_small", {"BACKBONE__FREEZE_AT": 2}),
        ("efficientnet_lite0", {"BACKBONE__FIXED_BN_STATISTICS": True}),
        ("convnext_atto", {"TIMM__DROP_PATH_RATE": 0.1}),
        ("resnet10t", {"TIMM__NORM": "FrozenBN", "TIMM__DEFORM_ON_PER_STAGE": [False, True, True, True]}),
        ("hrnet_w18_small", {}),
    ],
)
def test_every_parameter_is_trained(name, options):
    assert_every_parameter_is_trained(retinanet_cfg(BUILDER, TIMM__NAME=name, **options))


def test_channels_last():
    torch.manual_seed(0)
    assert_channels_last_computes_the_same(network("convnext_atto"))


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_stages(modulated):
    """All 3x3 convolutions of these stages, by names that leave the classifier's as they are."""
    torch.manual_seed(0)
    options = {"TIMM__DEFORM_ON_PER_STAGE": [False, False, False, True], "TIMM__DEFORM_MODULATED": modulated}
    model, plain = network("res2net50d", **options).eval(), network("res2net50d").eval()
    deformable = {name for name, module in model.named_modules() if isinstance(module, DeformableConv2d)}
    assert deformable == {f"body.layer4.{block}.convs.{index}" for block in range(3) for index in range(3)}
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {f"{name}.conv_offset.{part}" for name in deformable for part in ("weight", "bias")}
    model.load_state_dict(plain.state_dict(), strict=False)
    if modulated:
        for name in deformable:
            model.get_submodule(name).conv_offset.bias.data[18:] = 40.0
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)["res5"], plain(image)["res5"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("", {}, "^MODEL.TIMM.NAME is empty"),
        ("mobilnetv3_small_050", {}, "has no model 'mobilnetv3_small_050'; did you mean mobilenetv3_small_050"),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "has no model"),
        ("vit_tiny_patch16_224", {}, "strides 16, .*none of 8; choose a network whose strides are 4, 8, 16 and 32"),
        ("swin_tiny_patch4_window7_224", {}, "does not run on images of 64x96 pixels .*; choose"),
        ("resnet10t", {"TIMM__NORM": "GN"}, "MODEL.TIMM.NORM is 'GN'; choose one of BN, SyncBN, FrozenBN"),
        ("convnext_atto", {"TIMM__NORM": "FrozenBN"}, "'FrozenBN', but convnext_atto has no batch norm"),
        ("convnext_atto", {"BACKBONE__FIXED_BN_STATISTICS": True}, "no batch norm .*MODEL.TIMM.NORM"),
        ("hrnet_w18_small", {"BACKBONE__FREEZE_AT": 2}, "^MODEL.BACKBONE.FREEZE_AT: .*stages of hrnet_w18_small"),
        ("convnext_atto", {"TIMM__DEFORM_ON_PER_STAGE": [False, False, False, True]}, "no 3x3 convolution that could"),
        ("resnet10t", {"TIMM__DEFORM_ON_PER_STAGE": [True]}, r"DEFORM_ON_PER_STAGE is \[True\]; give four"),
        ("dla46_c", {"TIMM__DROP_PATH_RATE": 0.1}, "timm builds no features of dla46_c .*drop_path_rate"),
        ("resnet10t", {"PIXEL_MEAN": [128.0], "PIXEL_STD": [1.0]}, "MODEL.PIXEL_MEAN has 1 entries"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        build(retinanet_cfg(BUILDER, TIMM__NAME=name, **options))


def test_without_timm(monkeypatch):
    """One sentence where it is asked for; all else works."""
    code = "import sys; sys.modules['timm'] = None; import d2_distill"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="^MODEL.TIMM.NAME needs timm .*; install it: pip install 'timm>="):
        network("mnasnet_small")

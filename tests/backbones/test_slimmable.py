"""Slimmable networks: each width is the published network's, all its parameters are trained, its weights load."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from d2_distill.backbones.slimmable import SlimmableMobileNetV2, SlimmableResNet
from d2_distill.checkpoint.exact import load_exactly
from d2_distill.checkpoint.slimmable import is_slimmable, of_one_width
from d2_distill.engine.trainer import Trainer
from d2_distill.errors import UserError
from d2_distill.evaluation.complexity import count_parameters

from ..small_detectors import build, detector_cfg, distiller_cfg, save_teacher
from .slimmable_networks import MOBILENET_WIDTHS, RESNET_WIDTHS, PublishedMobileNetV2, PublishedResNet
from .torchvision_trunks import assert_every_parameter_is_trained

FEATURES = ["res2", "res3", "res4", "res5"]
WIDTHS = {"resnet": RESNET_WIDTHS, "mobilenet_v2": MOBILENET_WIDTHS}
EVERY_WIDTH = [(network, index) for network, widths in WIDTHS.items() for index in range(len(widths))]
# Cheap enough for the tests of what does not depend on the width.
SMALL = (0.0625, 0.125)


def keys(network: str, index: int = 0, widths=None, **overrides):
    """Overrides of a config for such a backbone."""
    widths = WIDTHS[network] if widths is None else widths
    return {
        "BACKBONE__NAME": f"build_slimmable_{network}_fpn_backbone",
        "FPN__IN_FEATURES": FEATURES,
        "SLIMMABLE__WIDTH_MULT": widths[index],
        "SLIMMABLE__WIDTH_MULT_LIST": list(widths),
        **overrides,
    }


def small(index: int = 0, **overrides):
    return keys("resnet", index, widths=SMALL, **overrides)


@pytest.fixture(scope="module")
def networks():
    return {"resnet": PublishedResNet(), "mobilenet_v2": PublishedMobileNetV2()}


@pytest.fixture(scope="module")
def published_small():
    return PublishedResNet(SMALL)


def assert_same_features(found, expected):
    assert list(found) == list(expected) == FEATURES
    for name, feature in expected.items():
        assert feature.abs().max() > 0
        torch.testing.assert_close(found[name], feature, rtol=1e-4, atol=1e-5 * feature.abs().max().item())


@pytest.mark.parametrize("network, index", EVERY_WIDTH)
def test_every_width_is_the_published_networks(networks, network, index):
    bottom_up = build(detector_cfg("RetinaNet", **keys(network, index))).backbone.bottom_up.eval()
    found = of_one_width(networks[network].state, bottom_up)
    assert set(found) == set(bottom_up.state_dict())
    bottom_up.load_state_dict(found)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features, expected = bottom_up(image), networks[network](index, image)
    assert_same_features(features, expected)
    assert list(bottom_up.output_shape()) == FEATURES
    for name, shape in bottom_up.output_shape().items():
        assert features[name].shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)
    # Only this width exists: parameters are those of the slices.
    slices = sum(value.numel() for value in found.values() if value.dim() == 4)
    assert slices == sum(p.numel() for p in bottom_up.parameters() if p.dim() == 4)
    assert not any("bn." in name for name in bottom_up.state_dict())


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_every_depth_at_every_width(depth):
    published = PublishedResNet(SMALL, {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth])
    image = torch.rand(1, 3, 64, 64)
    for index, width in enumerate(SMALL):
        network = SlimmableResNet(
            depth=depth, width_mult=width, width_index=index, norm="BN", out_features=FEATURES, freeze_at=0
        )
        network.load_state_dict(of_one_width(published.state, network))
        with torch.no_grad():
            assert_same_features(network.eval()(image), published(index, image))


@pytest.mark.parametrize("widths", [RESNET_WIDTHS, (0.25, 1.0), (0.25, 0.35), (0.25,), (0.3, 0.4, 0.6, 0.9)])
def test_residuals_of_mobilenet_v2_depend_on_all_widths(widths):
    """At width 0.25 rounding makes 32 and 16 channels equal, but a residual is shared with the other widths."""
    published = PublishedMobileNetV2(widths)
    image = torch.rand(1, 3, 64, 64)
    for index, width in enumerate(widths):
        network = SlimmableMobileNetV2(
            width_mult=width, width_index=index, widths=widths, norm="BN", out_features=FEATURES, freeze_at=0
        )
        network.load_state_dict(of_one_width(published.state, network))
        with torch.no_grad():
            assert_same_features(network.eval()(image), published(index, image))


def test_width_1_is_torchvisions():
    """In parameters; less the classifier."""
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(), torchvision.models.mobilenet_v2().features
    theirs[0].fc = nn.Identity()
    for network, trunk in zip(WIDTHS, theirs):
        ours = build(detector_cfg("RetinaNet", **keys(network, -1))).backbone.bottom_up
        assert count_parameters(ours) == count_parameters(trunk)


def fcos_cfg(**overrides):
    """FCOS that reads P2 to P7, with P6 on res5 as MSAD has it."""
    cfg = detector_cfg(
        "OpenMMLabFCOS", **{"FPN__TOP_BLOCK_IN_FEATURE": "res5", "FPN__TOP_BLOCK_RELU": True, **overrides}
    )
    cfg.MODEL.FCOS.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [16, 32, 64, 96, 128]
    return cfg


@pytest.mark.parametrize("network, index", EVERY_WIDTH)
def test_every_parameter_is_trained(network, index):
    assert_every_parameter_is_trained(fcos_cfg(**keys(network, index)))


@pytest.mark.parametrize("overrides", [{"BACKBONE__FREEZE_AT": 2}, {"SLIMMABLE__NORM": "FrozenBN"}])
def test_what_is_not_frozen_is_trained(overrides):
    assert_every_parameter_is_trained(fcos_cfg(**small(**overrides)))


@pytest.mark.parametrize("network", WIDTHS)
@pytest.mark.parametrize("freeze_at, frozen", [(-1, 0), (0, 0), (1, 1), (2, 2), (3, 3), (5, 5)])
def test_freezing(network, freeze_at, frozen):
    """Detectron2's meaning: the stem, then a stage each; their batch norms are frozen for good."""
    model = build(detector_cfg("RetinaNet", **keys(network, BACKBONE__FREEZE_AT=freeze_at))).backbone.bottom_up
    layers = [layer for _, layer in model.layers()]
    # MobileNetV2's stem is its first two layers; see its stages.
    ends = {"resnet": [0, 1, 4, 8, 14, 17], "mobilenet_v2": [0, 2, 4, 7, 14, 19]}[network]
    assert len(layers) == ends[-1]
    for number, layer in enumerate(layers):
        norms = {type(m) for m in layer.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))}
        is_frozen = number < ends[frozen]
        assert norms == {FrozenBatchNorm2d if is_frozen else nn.BatchNorm2d}
        assert all(p.requires_grad is not is_frozen for p in layer.parameters())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"SLIMMABLE__WIDTH_MULT": 0.3}, r"WIDTH_MULT is 0.3, which MODEL.SLIMMABLE.WIDTH_MULT_LIST \[0.25, "),
        ({"SLIMMABLE__DEPTH": 34}, "MODEL.SLIMMABLE.DEPTH is 34; choose one of 50, 101, 152"),
        ({"SLIMMABLE__NORM": "GN"}, "MODEL.SLIMMABLE.NORM is 'GN'; choose one of BN, SyncBN, FrozenBN"),
        ({"FPN__IN_FEATURES": ["res4"]}, r"MODEL.FPN.IN_FEATURES is \['res4'\]; it must end with 'res5'"),
        ({"PIXEL_MEAN": [128.0], "PIXEL_STD": [1.0]}, "MODEL.PIXEL_MEAN has 1 entries"),
    ],
)
def test_options_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build(detector_cfg("RetinaNet", **keys("resnet", **overrides)))


def test_synchronised_norms_are_batch_norms_on_the_cpu(caplog):
    overrides = {"FPN__NORM": "SyncBN", "RETINANET__NORM": "SyncBN", "BACKBONE__FREEZE_AT": 0}
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        model = build(detector_cfg("RetinaNet", **small(SLIMMABLE__NORM="SyncBN", **overrides)))
    assert "SyncBN is batch norm" in caplog.text
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    plain = build(detector_cfg("RetinaNet", **small(**{**overrides, "FPN__NORM": "BN", "RETINANET__NORM": "BN"})))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.backbone.parameters())


def save(path: Path, state, prefix: str = "module.", wrapped: bool = True) -> str:
    state = {f"{prefix}{name}": value for name, value in state.items()}
    state[f"{prefix}classifier.0.weight"] = torch.zeros(10, 256)
    torch.save({"model": state} if wrapped else state, path)
    return str(path)


def trainer(cfg, folder: Path, weights: str) -> Trainer:
    """As train_net.py makes it."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = weights, str(folder / "output")
    torch.manual_seed(1)
    model = build_model(cfg) if cfg.MODEL.META_ARCHITECTURE == "Distiller" else build(cfg)
    trainer = Trainer(cfg, model)
    trainer.resume_or_load(resume=False)
    return trainer


@pytest.mark.parametrize("name, prefix, wrapped", [("a.pth", "module.", True), ("some name", "", False)])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_public_weights_load_under_any_file_name(tmp_path, published_small, name, prefix, wrapped, norm):
    weights = save(tmp_path / name, published_small.state, prefix, wrapped)
    cfg = detector_cfg("OpenMMLabFCOS", **small(1, SLIMMABLE__NORM=norm))
    model = trainer(cfg, tmp_path, weights).model.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_features(model.backbone.bottom_up(image), published_small(1, image))
    # A checkpoint of the run is an ordinary one.
    torch.save({"model": model.state_dict()}, tmp_path / "student.pth")
    again = build(cfg)
    load_exactly(again, str(tmp_path / "student.pth"), key="MODEL.WEIGHTS")
    resumed = trainer(cfg, tmp_path, str(tmp_path / "student.pth")).model
    for other in (again, resumed):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_public_weights_load_into_a_distilled_low_resolution_student(tmp_path, published_small):
    weights = save(tmp_path / "weights.bin", published_small.state)
    overrides = small(BACKBONE__NAME="build_low_resolution_backbone", FPN__TOP_BLOCK="P6")
    overrides["LOW_RESOLUTION__BACKBONE"] = "build_slimmable_resnet_fpn_backbone"
    cfg = distiller_cfg("OpenMMLabFCOS", save_teacher(tmp_path, "OpenMMLabFCOS"), ["PKD"], **overrides)
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [16, 32, 64, 96]
    bottom_up = trainer(cfg, tmp_path, weights).model.student.backbone.bottom_up.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_features(bottom_up(image), published_small(0, image))


@pytest.mark.parametrize(
    "change, listing",
    [
        (lambda state: state.pop("features.3.body.6.weight"), r"\(1 missing .*: backbone.bottom_up.res2.2.conv3.weight"),
        (lambda state: state.pop("features.1.shortcut.1.bn.0.bias"), "backbone.bottom_up.res2.0.shortcut.norm.bias"),
        # A network of fewer channels.
        (lambda state: state.update({"features.0.0.weight": torch.zeros(2, 3, 7, 7)}), "bottom_up.stem.conv1.weight"),
    ],
)
def test_incomplete_weights_are_refused(tmp_path, published_small, change, listing):
    state = dict(published_small.state)
    change(state)
    weights = save(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=f"^MODEL.WEIGHTS: {weights} does not fill the slimmable backbone; .*{listing}"):
        trainer(detector_cfg("OpenMMLabFCOS", **small()), tmp_path, weights)


@pytest.mark.parametrize(
    "overrides",
    [
        {"SLIMMABLE__WIDTH_MULT_LIST": [0.125, 0.0625]},  # another order
        {"SLIMMABLE__DEPTH": 101},
        {"BACKBONE__NAME": "build_slimmable_mobilenet_v2_fpn_backbone"},
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, published_small, overrides):
    weights = save(tmp_path / "a.pth", published_small.state)
    with pytest.raises(UserError, match="does not fill the slimmable backbone; .*WIDTH_MULT_LIST"):
        trainer(detector_cfg("OpenMMLabFCOS", **{**small(), **overrides}), tmp_path, weights)


def test_weights_of_an_ordinary_network_are_refused(tmp_path):
    """Instead of a start from scratch, with a warning, that nobody reads."""
    torch.save({"model": torchvision.models.resnet18().state_dict()}, tmp_path / "resnet18.pth")
    message = "resnet18.pth does not fit the backbone, a SlimmableResNet: .*stem.conv1.weight.* use the published"
    with pytest.raises(UserError, match=message):
        trainer(detector_cfg("OpenMMLabFCOS", **small()), tmp_path, str(tmp_path / "resnet18.pth"))


def test_an_ordinary_detector_refuses_slimmable_weights(tmp_path, published_small):
    weights = save(tmp_path / "a.pth", published_small.state)
    with pytest.raises(UserError, match="a.pth holds a slimmable network, but the backbone of OpenMMLabFCOS is none"):
        trainer(detector_cfg("OpenMMLabFCOS"), tmp_path, weights)


def test_only_slimmable_weights_are_taken_for_such():
    """Torchvision's MobileNetV2 has layers of the same names."""
    with torch.device("meta"):
        others = torchvision.models.mobilenet_v2(), torchvision.models.resnet50()
    assert not any(is_slimmable(model.state_dict()) for model in others)

"""Weights of timm by name or as a file: the backbone computes what timm's classifier does; others are refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from d2_distill.checkpoint.exact import TrainingCheckpointer
from d2_distill.checkpoint.timm_hub import TimmWeights
from d2_distill.checkpoint.torchvision import check_pretrained, is_address, load_pretrained, require_fitting
from d2_distill.config.pretrained import corrections, with_pretrained_inputs
from d2_distill.errors import UserError

from ..backbones.test_timm_trunk import BUILDER, classifier_maps, timm
from ..backbones.torchvision_trunks import FEATURES, diversify
from ..small_detectors import build, detector_cfg

huggingface_hub = pytest.importorskip("huggingface_hub", reason="comes with timm")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="comes with timm")

NETWORK, TAG = "mobilenetv3_small_050", "lamb_in1k"
ADDRESS = f"timm://{NETWORK}"
RESNET18 = {
    "BACKBONE__NAME": "build_p3p7_resnet_fpn_backbone", "RESNETS__STEM_OUT_CHANNELS": 64,
    "RESNETS__RES2_OUT_CHANNELS": 64, "RESNETS__OUT_FEATURES": FEATURES,
}


@pytest.fixture(autouse=True)
def no_download(tmp_path, monkeypatch):
    """The caches are ours, and the hub is told that there is no connection; trying takes it half a minute."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def classifier(name: str) -> nn.Module:
    torch.manual_seed(0)
    return diversify(timm.create_model(name)).eval()


def put_weights(address: str, model: nn.Module) -> TimmWeights:
    """Save a classifier where the sentence of a failed download says."""
    weights = TimmWeights.of(address)
    path = Path(weights.path)
    assert path.parent == Path(torch.hub.get_dir()) / "checkpoints" and path.name == f"{weights.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_torch.save_file(model.state_dict(), weights.path)
    return weights


def config(weights=ADDRESS, image_format="RGB", **overrides):
    overrides = {"BACKBONE__NAME": BUILDER, "TIMM__NAME": NETWORK, "FPN__IN_FEATURES": FEATURES, **overrides}
    cfg = detector_cfg("RetinaNet", WEIGHTS=weights, **overrides)
    cfg.INPUT.FORMAT = image_format
    return cfg


def pretrained(cfg) -> nn.Module:
    cfg = with_pretrained_inputs(cfg)
    model = build(cfg)
    check_pretrained(model, cfg.MODEL.WEIGHTS)
    load_pretrained(model, cfg.MODEL.WEIGHTS, input_format=cfg.INPUT.FORMAT)
    return model.eval()


def assert_same_maps(model: nn.Module, name: str, theirs: nn.Module, image_format: str = "RGB") -> None:
    image = torch.randn(1, 3, 64, 96)
    expected = classifier_maps(name, theirs, image)
    with torch.no_grad():
        found = model.backbone.bottom_up(image.flip(1) if image_format == "BGR" else image)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5 * float(expected[key].abs().max()))


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    "name, overrides",
    [
        (NETWORK, {"BACKBONE__FREEZE_AT": 2}),
        ("convnext_atto", {}),
        ("repvgg_a0", {"TIMM__NORM": "FrozenBN"}),  # two convolutions read the image
        ("resnet10t", {"TIMM__DEFORM_ON_PER_STAGE": [False, False, True, True]}),
    ],
)
def test_the_network_of_the_weights(name, overrides, image_format, caplog):
    theirs = classifier(name)
    weights = put_weights(f"timm://{name}", theirs)
    with caplog.at_level(logging.INFO):
        model = pretrained(config(f"timm://{name}", image_format, TIMM__NAME=name, **overrides))
    assert_same_maps(model, name, theirs, image_format)
    assert f"ImageNet weights of timm's {weights.name}:" in caplog.text
    assert ("conv_offset" in caplog.text) == ("TIMM__DEFORM_ON_PER_STAGE" in overrides)


@pytest.mark.parametrize("address", ["timm://resnet18", "timm://resnet18.a2_in1k"])
def test_a_resnet_of_detectron2(address):
    """timm's ResNets have the tensors of torchvision's."""
    theirs = classifier("resnet18")
    put_weights(address, theirs)
    assert_same_maps(pretrained(config(address, **RESNET18)), "resnet18", theirs)


@pytest.mark.parametrize("network", [NETWORK, f"{NETWORK}.{TAG}"])
@pytest.mark.parametrize("kind", ["plain", "model", "state_dict", "safetensors", "headless"])
def test_a_file(tmp_path, kind, network, caplog):
    """Of a classifier in timm's names, as timm, its training or its hub write it."""
    theirs = classifier(NETWORK)
    state = theirs.state_dict()
    path = tmp_path / ("mine.safetensors" if kind == "safetensors" else "mine.pth")
    if kind == "safetensors":
        safetensors_torch.save_file(state, path)
    elif kind == "headless":
        head = ("classifier", "conv_head")
        torch.save({name: value for name, value in state.items() if not name.startswith(head)}, path)
    else:
        torch.save(state if kind == "plain" else {kind: state, "epoch": 3}, path)
    model = build(config("", TIMM__NAME=network))
    with caplog.at_level(logging.INFO):
        TrainingCheckpointer(model).load(str(path))
    assert_same_maps(model.eval(), NETWORK, theirs)
    assert "tensors of a classifier in timm's names fill the backbone" in caplog.text


def test_a_checkpoint_of_a_student_is_not_taken_for_a_classifier(tmp_path):
    cfg = config("")
    student, other = build(cfg, salt=1), build(cfg, salt=2)
    TrainingCheckpointer(student, str(tmp_path)).save("student")
    TrainingCheckpointer(other).load(str(tmp_path / "student.pth"))
    for name, value in student.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_cache_of_the_hub(tmp_path):
    """As a download leaves it."""
    theirs = classifier(NETWORK)
    folder = tmp_path / "hub" / f"models--timm--{NETWORK}.{TAG}"
    for part in ("refs", "snapshots/0123"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    safetensors_torch.save_file(theirs.state_dict(), folder / "snapshots" / "0123" / "model.safetensors")
    assert_same_maps(pretrained(config()), NETWORK, theirs)


def test_a_file_of_a_deeper_network(tmp_path):
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "mine.pth")
    for overrides in (RESNET18, {"TIMM__NAME": "resnet18"}):
        with pytest.raises(UserError, match="mine.pth does not fit the backbone, a .* tensors more in its stages"):
            TrainingCheckpointer(build(config("", **overrides))).load(str(tmp_path / "mine.pth"))


def test_an_incomplete_file(tmp_path):
    state = classifier(NETWORK).state_dict()
    del state["blocks.0.0.conv_pw.weight"]
    torch.save(state, tmp_path / "mine.pth")
    message = r"mine.pth does not fit the backbone, a TimmTrunk: 1 of its .*blocks.0.0.conv_pw.weight"
    with pytest.raises(UserError, match=message):
        TrainingCheckpointer(build(config(""))).load(str(tmp_path / "mine.pth"))
    weights = TimmWeights.of(ADDRESS)
    put_weights(ADDRESS, nn.Linear(1, 1))
    with pytest.raises(UserError, match=f"{weights.path} cannot be read as the weights of timm's .*; remove it"):
        check_pretrained(build(config()), ADDRESS)


@pytest.mark.parametrize(
    "address, message",
    [
        ("timm://mobilnetv3_small_050", "no model 'mobilnetv3_small_050'; did you mean timm://mobilenetv3_small_050"),
        ("timm://", "has no model ''"),
        (f"{ADDRESS}.in21k", f"{NETWORK} has no weights 'in21k'; use one of {TAG}, or {ADDRESS} for its default"),
    ],
)
def test_addresses_of_nothing(address, message):
    assert is_address(address)
    with pytest.raises(UserError, match=f"^MODEL.WEIGHTS: .*{message}"):
        corrections(config(address), address)


@pytest.mark.parametrize(
    "address, overrides, message",
    [
        # Equal tensors, but another padding.
        ("timm://tf_efficientnet_lite0", {"TIMM__NAME": "efficientnet_lite0"},
         "use timm://efficientnet_lite0, or set MODEL.TIMM.NAME to tf_efficientnet_lite0"),
        ("torchvision://resnet18", {"TIMM__NAME": "resnet18"}, "not fit the backbone, timm's resnet18; use timm://"),
        (ADDRESS, RESNET18, "a ResNet: .* use torchvision://resnet18, or build the network of mobilenetv3_small_050 "
         r"\(MODEL.BACKBONE.NAME build_timm_fpn_backbone with MODEL.TIMM.NAME mobilenetv3_small_050\)"),
        # All of ResNet-18, and more.
        ("timm://resnet34", RESNET18, r"timm's resnet34.a1_in1k does not fit the backbone, .*: it has \d+ tensors "
         r"more in its stages \(res2.2.conv1.weight, ...\); use torchvision://resnet18, or build the network of "),
    ],
)
def test_weights_of_another_network(address, overrides, message):
    """Known without the file."""
    model = build(config(address, **overrides))
    for check in (require_fitting, check_pretrained):
        with pytest.raises(UserError, match=message):
            check(model, address)


def test_no_connection():
    """The sentence names the file, its address and the place where it is found then."""
    weights = TimmWeights.of(f"{ADDRESS}.{TAG}")
    url = f"https://huggingface.co/timm/{NETWORK}.{TAG}/resolve/main/model.safetensors"
    with pytest.raises(UserError) as refusal:
        check_pretrained(build(config()), ADDRESS)
    text = str(refusal.value)
    assert text.startswith(f"MODEL.WEIGHTS: model.safetensors, the weights of timm's {NETWORK}.{TAG}, cannot be ")
    assert text.endswith(f"download {url} elsewhere and put it at {weights.path}.") and "\n" not in text


HALF = [127.5] * 3


@pytest.mark.parametrize("image_format, order", [("RGB", 1), ("BGR", -1)])
def test_pixels_are_those_of_the_models_data_config(image_format, order, caplog):
    """Detectron2's defaults are corrected; other values are refused."""
    rgb = {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
    lite = "timm://tf_efficientnet_lite0"
    with caplog.at_level(logging.INFO):
        cfg = with_pretrained_inputs(config(lite, image_format))
    assert cfg.MODEL.PIXEL_MEAN == HALF and cfg.MODEL.PIXEL_STD == HALF and cfg.INPUT.FORMAT == image_format
    assert "timm://tf_efficientnet_lite0: MODEL.PIXEL_MEAN is [127.5, 127.5, 127.5] (it was [103.53," in caplog.text
    assert not corrections(cfg, lite)
    cfg = with_pretrained_inputs(config(ADDRESS, image_format))
    assert list(cfg.MODEL.PIXEL_STD) == pytest.approx(rgb["MODEL.PIXEL_STD"][::order])
    assert list(cfg.MODEL.PIXEL_MEAN) == pytest.approx(rgb["MODEL.PIXEL_MEAN"][::order])
    with pytest.raises(UserError, match=r"^MODEL.PIXEL_STD is \[127.5, .*was trained with \[5.*; set it to that"):
        corrections(config(ADDRESS, image_format, PIXEL_STD=HALF), ADDRESS)
    with pytest.raises(UserError, match=r"^MODEL.PIXEL_MEAN is \[0.0, .*was trained with \[127.5, "):
        corrections(config(lite, image_format, PIXEL_MEAN=[0.0] * 3), lite)


def test_stride_of_a_resnet():
    assert "MODEL.RESNETS.STRIDE_IN_1X1" not in corrections(config("timm://resnet18"), "timm://resnet18")
    assert corrections(config("timm://resnet50"), "timm://resnet50")["MODEL.RESNETS.STRIDE_IN_1X1"] is False

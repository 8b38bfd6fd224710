"""torchvision's weights by name: the backbone computes what torchvision's model does; what does not fit is refused."""

from __future__ import annotations

import logging
import urllib.request

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_backbone
from torch import nn

from d2_distill import provider
from d2_distill.checkpoint.exact import TrainingCheckpointer, load_exactly
from d2_distill.checkpoint.torchvision import (
    TorchvisionWeights,
    check_pretrained,
    is_address,
    load_pretrained,
    marked_rules,
    shapes_of,
)
from d2_distill.checkpoint.torchvision.layouts import RULES
from d2_distill.config.pretrained import with_pretrained_inputs
from d2_distill.errors import UserError

from ..pretrained import put_weights, torchvision_model
from ..small_detectors import build, detector_cfg

STAGES = ["res2", "res3", "res4", "res5"]
FROM_P2 = {"RESNETS__OUT_FEATURES": STAGES, "FPN__IN_FEATURES": STAGES}
RESNET = {"BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone", "RESNETS__STEM_OUT_CHANNELS": 64}
RESNET18 = {**RESNET, "RESNETS__DEPTH": 18, "RESNETS__RES2_OUT_CHANNELS": 64}
RESNET50 = {**RESNET, "RESNETS__DEPTH": 50, "RESNETS__RES2_OUT_CHANNELS": 256}
NARROW = {"BACKBONE__NAME": "build_narrow_resnet_fpn_backbone"}
MOBILENET = {"BACKBONE__NAME": "build_mobilenet_v2_fpn_backbone"}
SLIMMABLE_MOBILENET = {
    "BACKBONE__NAME": "build_slimmable_mobilenet_v2_fpn_backbone", "SLIMMABLE__WIDTH_MULT_LIST": [0.35, 0.5, 0.75, 1.0],
}
SLIMMABLE_RESNET = {"BACKBONE__NAME": "build_slimmable_resnet_fpn_backbone"}
SWIN = {"BACKBONE__NAME": "build_swin_fpn_backbone"}
LOW = {
    **RESNET18, **FROM_P2, "BACKBONE__NAME": "build_low_resolution_backbone",
    "LOW_RESOLUTION__BACKBONE": "build_p3p7_resnet_fpn_backbone", "FPN__TOP_BLOCK": "",
    "RETINANET__IN_FEATURES": ["p3", "p4", "p5", "p6"], "ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [96]],
}
# MultiScaleDetector reads P2 to P5 in both resolutions.
MSAD = {**RESNET18, **FROM_P2, "BACKBONE__NAME": "build_p3p7_resnet_fpn_backbone", "FPN__TOP_BLOCK": ""}


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    return tmp_path_factory.mktemp("torch_home")


@pytest.fixture(scope="module")
def saved(torch_home):
    """Returns torchvision's model of a name, whose weights are in the cache."""
    models: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in models:
            models[name] = torchvision_model(name)
            put_weights(torch_home, models[name], name)
        return models[name]

    return get


@pytest.fixture(autouse=True)
def no_download(torch_home, monkeypatch):
    """The cache is ours, and nobody listens at port 9."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies


def pretrained(name, case="RetinaNet", image_format="BGR", **overrides):
    """A detector whose config keeps Detectron2's pixel statistics and strides, with the weights loaded."""
    cfg = detector_cfg(case, WEIGHTS=f"torchvision://{name}", **overrides)
    cfg.INPUT.FORMAT = image_format
    cfg = with_pretrained_inputs(cfg)
    model = build(cfg)
    check_pretrained(model, cfg.MODEL.WEIGHTS)
    load_pretrained(model, cfg.MODEL.WEIGHTS, input_format=cfg.INPUT.FORMAT)
    return model.eval()


def resnet_features(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = {}
    for stage in range(1, 5):
        x = getattr(model, f"layer{stage}")(x)
        features[f"res{stage + 1}"] = x
    return features


def trunk_features(model: nn.Module, x: torch.Tensor, ends: dict[str, int]) -> dict[str, torch.Tensor]:
    return {name: model.features[:end](x) for name, end in ends.items()}


def expected_features(name: str, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if name == "mobilenet_v2":
        return trunk_features(model, x, {"res2": 4, "res3": 7, "res4": 14, "res5": 19})
    if name == "swin_t":  # (N, H, W, C), to which our LayerNorms, here still with their initial weights, are applied
        taps = trunk_features(model, x, {"res2": 2, "res3": 4, "res4": 6, "res5": 8})
        return {key: F.layer_norm(tap, tap.shape[-1:]).permute(0, 3, 1, 2) for key, tap in taps.items()}
    return resnet_features(model, x)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("resnet18", {**RESNET18, "RESNETS__NORM": "FrozenBN", "BACKBONE__FREEZE_AT": 2}),
        ("resnet18", {**RESNET18, "RESNETS__NORM": "BN"}),
        ("resnet18", {**RESNET18, **NARROW}),
        ("resnet18", {**RESNET18, "RESNETS__NORM": "BN", "BACKBONE__FIXED_BN_STATISTICS": True}),
        ("resnet50", RESNET50),
        ("resnet50", {**SLIMMABLE_RESNET, "SLIMMABLE__WIDTH_MULT": 1.0}),
        ("mobilenet_v2", MOBILENET),
        ("mobilenet_v2", {**MOBILENET, "BACKBONE__FREEZE_AT": 3, "MOBILENETV2__NORM": "FrozenBN"}),
        ("mobilenet_v2", SLIMMABLE_MOBILENET),
        ("swin_t", SWIN),
    ],
)
def test_features_are_those_of_torchvision(saved, name, overrides, image_format):
    """Of the same picture, as torchvision normalizes it."""
    theirs = saved(name)
    ours = pretrained(name, image_format=image_format, FPN__IN_FEATURES=STAGES[1:], **overrides)
    rgb = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    normalized = torchvision.transforms.functional.normalize(rgb / 255, preset.mean, preset.std)[None]
    with torch.no_grad():
        images = ours.preprocess_image([{"image": rgb.flip(0) if image_format == "BGR" else rgb}])
        features = ours.backbone.bottom_up(images.tensor)
        expected = expected_features(name, theirs, normalized)
    assert list(features) == STAGES[1:]
    for key, feature in features.items():
        scale = expected[key].abs().max().item()
        assert scale > 0.1
        torch.testing.assert_close(feature / scale, expected[key] / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case, overrides, name", [("RetinaNet", LOW, "backbone.pyramid"),
                                                   ("MultiScaleDetector", MSAD, "detector.backbone")])
def test_backbones_inside_others(saved, case, overrides, name):
    theirs = saved("resnet18")
    ours = pretrained("resnet18", case, "RGB", **overrides).get_submodule(f"{name}.bottom_up").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(image)["res5"], resnet_features(theirs, image)["res5"], rtol=1e-4, atol=1e-4
        )


def test_the_rest_stays_as_it_was(saved, caplog):
    saved("resnet18")
    cfg = detector_cfg("RetinaNet", **RESNET18)
    before = {name: value.clone() for name, value in build(cfg).state_dict().items()}
    model = build(cfg)
    with caplog.at_level(logging.INFO):
        load_pretrained(model, "torchvision://resnet18", input_format="BGR")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("backbone.bottom_up.")}
    assert caplog.messages[-1] == (
        "ImageNet weights of torchvision's resnet18 (IMAGENET1K_V1): 100 tensors of the backbone, for images in the "
        "order BGR; FPN and head start fresh."
    )


def test_norms_that_swin_lacks_are_told(saved, caplog):
    saved("swin_t")
    with caplog.at_level(logging.INFO):
        pretrained("swin_t", **SWIN)
    assert "as do 6 tensors of the backbone that no classifier has, such as norms.res3.weight" in caplog.text


def test_weights_of_a_version(tmp_path, monkeypatch):
    """resnet50 has two files; the address says which."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for entry, value in (("IMAGENET1K_V1", 1.0), ("IMAGENET1K_V2", 2.0)):
        model = torchvision_model("resnet50")
        nn.init.constant_(model.conv1.weight, value)
        put_weights(tmp_path, model, "resnet50", entry)
        found = pretrained(f"resnet50/{entry}", **RESNET50).backbone.bottom_up.stem.conv1.weight
        assert (found == value).all()


SWIN_S = {**SWIN, "SWIN__DEPTHS": [2, 2, 18, 2]}
OF_TORCHVISION = {
    "resnet18": RESNET18,
    "resnet34": {**RESNET18, "RESNETS__DEPTH": 34},
    "resnet50": RESNET50,
    "resnet101": {**RESNET50, "RESNETS__DEPTH": 101},
    "resnet152": {**RESNET50, "RESNETS__DEPTH": 152},
    "resnext50_32x4d": {**RESNET50, "RESNETS__NUM_GROUPS": 32, "RESNETS__WIDTH_PER_GROUP": 4},
    "resnext101_32x8d": {
        **RESNET50, "RESNETS__DEPTH": 101, "RESNETS__NUM_GROUPS": 32, "RESNETS__WIDTH_PER_GROUP": 8,
    },
    "resnext101_64x4d": {
        **RESNET50, "RESNETS__DEPTH": 101, "RESNETS__NUM_GROUPS": 64, "RESNETS__WIDTH_PER_GROUP": 4,
    },
    "wide_resnet50_2": {**RESNET50, "RESNETS__WIDTH_PER_GROUP": 128},
    "wide_resnet101_2": {**RESNET50, "RESNETS__DEPTH": 101, "RESNETS__WIDTH_PER_GROUP": 128},
    "mobilenet_v2": MOBILENET,
    "swin_t": SWIN,
    "swin_s": SWIN_S,
    "swin_b": {**SWIN_S, "SWIN__EMBED_DIM": 128, "SWIN__NUM_HEADS": [4, 8, 16, 32]},
}


def on_meta(**overrides) -> nn.Module:
    """A backbone without values, as part of a detector."""
    with torch.device("meta"):
        return nn.ModuleDict({"backbone": build_backbone(detector_cfg("RetinaNet", **overrides))})


@pytest.mark.parametrize("name", RULES)
def test_every_model_has_a_backbone(name, tmp_path, monkeypatch):
    """Only the file is missing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded"):
        check_pretrained(on_meta(**OF_TORCHVISION[name]), f"torchvision://{name}/IMAGENET1K_V1")


@pytest.mark.parametrize("name", RULES)
def test_files_are_known_by_their_names(name):
    assert marked_rules(shapes_of(name)) == RULES[name]


@pytest.mark.parametrize(
    "address, message",
    [
        ("torchvision://ResNet18", "torchvision has no model 'ResNet18'; did you mean torchvision://resnet18"),
        ("torchvision://mobilenetv2", "did you mean torchvision://mobilenet_v2"),
        ("torchvision://", "has no model ''; use one of resnet18, resnet34"),
        ("torchvision://vgg16", "no backbone can start from torchvision's vgg16; use one of resnet18"),
        ("torchvision://swin_v2_t", "no backbone can start from torchvision's swin_v2_t"),
        ("torchvision://fasterrcnn_resnet50_fpn", "no backbone can start from torchvision's fasterrcnn_resnet50_fpn"),
        ("torchvision://resnet50/V3", "resnet50 has no weights 'V3'; use one of IMAGENET1K_V1, IMAGENET1K_V2, .*or"),
    ],
)
def test_unknown_names(address, message):
    assert is_address(address)
    with pytest.raises(UserError, match=f"^MODEL.WEIGHTS: .*{message}"):
        TorchvisionWeights.of(address)


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("resnet50", RESNET18, r"fit the backbone, a ResNet: \d+ of its 100 .*; use torchvision://resnet18, or build "
         r"the network of resnet50 \(MODEL.RESNETS.DEPTH 50 with STEM_OUT_CHANNELS 64 and RES2_OUT_CHANNELS 256\)"),
        ("resnet50", MOBILENET, "a MobileNetV2: 260 of its 260 .*features.0.0.weight.*; use "
         "torchvision://mobilenet_v2, or .* a ResNet's builder"),
        ("mobilenet_v2", RESNET18, "a ResNet: 100 of its 100 .*stem.conv1.weight.*; use torchvision://resnet18, or "),
        ("swin_t", SWIN_S, "a SwinTransformer: .*features.5.6.norm1.weight.*; use torchvision://swin_s, or "),
        # The narrow network of the small detectors: no model of torchvision has its widths.
        ("resnet18", NARROW, r"stem.conv1.weight \(64, 3, 7, 7\) \(backbone: \(8, 3, 7, 7\)\).*; set MODEL.WEIGHTS to "
         r"\"\", or build the network of resnet18 \(MODEL.RESNETS.DEPTH 18 with .* RES2_OUT_CHANNELS 64\)"),
        ("mobilenet_v2", {**MOBILENET, "MOBILENETV2__WIDTH_MULT": 0.5}, r"MODEL.MOBILENETV2.WIDTH_MULT 1.0\)"),
        ("resnet50", {**SLIMMABLE_RESNET, "SLIMMABLE__WIDTH_MULT": 0.25},
         "a SlimmableResNet: .*; use the published weights of the slimmable network, or .*SLIMMABLE.WIDTH_MULT 1.0"),
    ],
)
def test_weights_of_another_network(torch_home, name, overrides, message):
    """Said without the file, so that nothing is downloaded for it."""
    with pytest.raises(UserError, match=message) as error:
        check_pretrained(on_meta(FPN__IN_FEATURES=STAGES[1:], **overrides), f"torchvision://{name}/IMAGENET1K_V1")
    assert str(error.value).startswith(f"MODEL.WEIGHTS: torchvision's {name} (IMAGENET1K_V1) does not fit")


def test_other_backbones_are_refused():
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 3, 1)})
    with pytest.raises(UserError, match="cannot fill the backbone of ModuleDict; set MODEL.BACKBONE.NAME to a builder"):
        check_pretrained(model, "torchvision://resnet18")


@pytest.mark.skipif(provider.name() == "embedded", reason="the embedded Detectron2 has no Res5ROIHeads")
def test_res5_in_the_roi_heads(saved):
    theirs = saved("resnet50")
    cfg = detector_cfg("GeneralizedRCNN")
    cfg.merge_from_list([
        "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50,
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
        "MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]], "MODEL.ROI_HEADS.NAME", "Res5ROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
    ])
    model = build(cfg)
    load_pretrained(model, "torchvision://resnet50", input_format="RGB")
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, theirs.layer4[2].conv3.weight)


def test_no_connection(torch_home):
    expected = (
        r"^MODEL.WEIGHTS: resnet34-b627a593.pth, the weights of torchvision's resnet34 \(IMAGENET1K_V1\), cannot be "
        r"downloaded \(.*refused.*\); download https://download.pytorch.org/models/resnet34-b627a593.pth elsewhere and "
        rf"put it into {torch_home}/hub/checkpoints\.$"
    )
    with pytest.raises(UserError, match=expected):
        TorchvisionWeights.of("torchvision://resnet34").read()


def test_file_of_something_else(torch_home):
    """torch does not check the hash of a file that it has."""
    path = put_weights(torch_home, torchvision_model("resnet18"), "resnet34")
    try:
        with pytest.raises(UserError, match=f"^MODEL.WEIGHTS: {path} does not fit the backbone, .*res2.2.conv1"):
            check_pretrained(on_meta(**OF_TORCHVISION["resnet34"]), "torchvision://resnet34")
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(UserError, match=f"^MODEL.WEIGHTS: {path} cannot be read .*; remove it") as error:
            TorchvisionWeights.of("torchvision://resnet34").read()
        assert "\n" not in str(error.value)
    finally:
        path.unlink()


def test_not_a_detector(saved):
    saved("resnet18")
    model = build(detector_cfg("RetinaNet", **RESNET18))
    for key in ("MODEL.WEIGHTS", "MODEL.DISTILL.TEACHER.WEIGHTS"):
        with pytest.raises(UserError, match=f"^{key}: torchvision://resnet18 names the weights of a classifier"):
            load_exactly(model, "torchvision://resnet18", key=key)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name, overrides", [("resnet18", RESNET18), ("mobilenet_v2", MOBILENET)])
def test_a_file_in_torchvisions_names(saved, tmp_path, name, overrides, wrapped, caplog):
    """By any file name, through the trainer's checkpointer; colors stay in the order of the file."""
    theirs = saved(name)
    state = theirs.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "mine.pth")
    model = build(detector_cfg("RetinaNet", FPN__IN_FEATURES=STAGES[1:], **overrides))
    with caplog.at_level(logging.INFO):
        TrainingCheckpointer(model).load(str(tmp_path / "mine.pth"))
    assert "tensors of a classifier in torchvision's names fill the backbone" in caplog.text
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = model.eval().backbone.bottom_up(image)["res5"]
        torch.testing.assert_close(found, expected_features(name, theirs, image)["res5"], rtol=1e-4, atol=1e-4)


def test_a_file_that_does_not_fit(saved, tmp_path):
    torch.save(saved("mobilenet_v2").state_dict(), tmp_path / "mine.pth")
    model = build(detector_cfg("RetinaNet", **RESNET18))
    with pytest.raises(UserError, match="^MODEL.WEIGHTS: .*mine.pth does not fit the backbone, a ResNet: .*resnet18"):
        TrainingCheckpointer(model).load(str(tmp_path / "mine.pth"))


def test_checkpoints_of_detectors_are_not_converted(tmp_path):
    model = build(detector_cfg("RetinaNet"), salt=1)
    TrainingCheckpointer(model, str(tmp_path)).save("model")
    other = build(detector_cfg("RetinaNet"))
    TrainingCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())

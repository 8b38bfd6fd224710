"""tools/convert_openmmlab.py: a converted model computes what the layout means, and what was recorded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.structures import Boxes
from torch import nn

from d2_distill.apps.conversion.openmmlab import Checkpoint, Tensors, convert_openmmlab, pyramid, read_checkpoint
from d2_distill.backbones import LinearP6P7
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.building import build_detector
from d2_distill.errors import UserError
from d2_distill.layers.deformable import DeformableConv2d
from d2_distill.losses import align_statistics

from ..backbones.torchvision_trunks import diversify
from ..golden import cases
from . import conversions
from . import openmmlab_models as theirs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert_openmmlab as tool  # noqa: E402

run = partial(conversions.run, tool)
convert_file = partial(conversions.convert_file, tool)

R18_CHANNELS, R50_CHANNELS, SWIN_CHANNELS = [64, 128, 256, 512], [256, 512, 1024, 2048], [32, 64, 128]
FCOS = ["MODEL.FCOS.CENTER_SAMPLING_RADIUS", "0.0", "MODEL.FCOS.CENTERNESS_ON", "cls"]
FCOS += ["MODEL.FCOS.DISTANCES", "exp"]


def recorded(suite: str, name: str) -> cases.Case:
    """A committed case, wherever D2_DISTILL_GOLDEN points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("D2_DISTILL_GOLDEN", raising=False)
        return cases.load(suite, name)


def converted_model(state: theirs.State, opts: Sequence[str] = (), style: str = "pytorch", text: str = ""):
    """The converted config and model, without a file between."""
    conversion = convert_openmmlab(Checkpoint(state, text), style=style, opts=opts)
    conversion.cfg.MODEL.DEVICE = "cpu"
    model = build_detector(conversion.cfg).eval()
    missing, unexpected = model.load_state_dict(conversion.state_dict, strict=False)
    assert not missing and all(name.endswith("num_batches_tracked") for name in unexpected)
    return conversion.cfg, model


def assert_close(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(ours) == len(expected)
    for actual, value in zip(ours, expected):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return theirs.resnet("resnet18")


@pytest.fixture(scope="module")
def resnet18_state(resnet18) -> theirs.State:
    return theirs.resnet_state(resnet18)


@pytest.fixture()
def gfl_state(resnet18_state) -> theirs.State:
    torch.manual_seed(1)
    neck = theirs.neck_state(R18_CHANNELS[1:], p6_channels=theirs.CHANNELS)
    return {**resnet18_state, **neck, **theirs.head_state("gfl")}


# --- whole detectors against plain functions on the state dict


@pytest.mark.parametrize("detector", list(theirs.HEADS))
@torch.no_grad()
def test_one_stage_detectors(resnet18, resnet18_state, detector):
    torch.manual_seed(1)
    on_input, fcos = detector.startswith("retinanet"), detector.startswith("fcos")
    neck = theirs.neck_state(R18_CHANNELS[1:], p6_channels=512 if on_input else theirs.CHANNELS)
    state = {**resnet18_state, **neck, **theirs.head_state(detector)}
    cfg, model = converted_model(state, FCOS if fcos else ())
    assert cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE == ("res5" if on_input else "p5")
    assert cfg.MODEL.FPN.TOP_BLOCK_RELU == fcos

    image = torch.randn(1, 3, 128, 192)
    maps = theirs.neck_features(state, theirs.resnet_features(resnet18, image)[1:], relu=fcos)
    assert_one_stage(model, detector, state, image, maps)


def assert_one_stage(
    model, detector: str, state: theirs.State, image: torch.Tensor, maps: theirs.Maps
) -> None:
    """Features, outputs and, of RetinaNet, anchors."""
    features = list(model.backbone(image).values())
    assert_close(features, maps)
    fcos = detector.startswith("fcos")
    expected = theirs.head_outputs(state, detector, maps, centerness_on="cls" if fcos else "box")
    ours = dict(zip(model.head.predictors, model.head(features)))
    anchors = model.anchor_generator.num_anchors[0]
    for output, part in (("logits", "cls"), ("deltas", "reg"), ("centerness", "centerness")):
        assert (output in ours) == (part in expected)
        if anchors == 9 and part in expected:
            expected[part] = [to_size_outer(x, 3, 3, dim=1) for x in expected[part]]
        assert_close(ours.get(output, ()), expected.get(part, ()))
    if detector == "gflv2":
        qualities = [model.head.quality(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for x in ours["deltas"]]
        assert_close(qualities, expected["quality"])
    if anchors == 9:
        # Their anchor (ratio, octave) is our row 3 * octave + ratio.
        for level, boxes in enumerate(model.anchor_generator(features)):
            sides = [4 * 2 ** (level + 3) * 2 ** (octave / 3) for octave in range(3)]
            sizes = [(side / ratio**0.5, side * ratio**0.5) for side in sides for ratio in (0.5, 1.0, 2.0)]
            torch.testing.assert_close(
                boxes.tensor[:9], torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sizes])
            )


@torch.no_grad()
def test_swin_transformer():
    torch.manual_seed(3)
    swin = theirs.swin()
    neck = theirs.neck_state(SWIN_CHANNELS, p6_channels=SWIN_CHANNELS[-1])
    state = {**theirs.swin_state(swin), **neck, **theirs.head_state("retinanet")}
    cfg, model = converted_model(state)
    assert (cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.NUM_HEADS) == ([1, 2, 1, 2], [1, 2, 4, 8])
    assert (cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.WINDOW_SIZE) == (16, 4)
    image = torch.randn(1, 3, 192, 256)
    maps = theirs.neck_features(state, theirs.swin_features(swin, image))
    assert_one_stage(model, "retinanet", state, image, maps)


@torch.no_grad()
def test_caffe_faster_rcnn(tmp_path, capsys):
    torch.manual_seed(2)
    resnet50 = theirs.resnet("resnet50", caffe=True)
    neck, heads = theirs.neck_state(R50_CHANNELS), theirs.two_stage_state()
    state = {**theirs.resnet_state(resnet50), **neck, **heads}
    arguments = ["--style", "caffe-detectron2", "MODEL.RPN.NMS_THRESH", "0.6"]
    cfg, model = convert_file(tmp_path, capsys, {"state_dict": state}, *arguments)
    assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.RPN.NMS_THRESH == 0.6
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.NORM == "FrozenBN"

    image = torch.randn(1, 3, 96, 128)
    maps = theirs.neck_features(state, theirs.resnet_features(resnet50, image))
    features = list(model.backbone(image).values())
    assert_close(features, maps)
    assert_two_stage(model, state, features)


@torch.no_grad()
def assert_two_stage(model, state: theirs.State, features: theirs.Maps) -> None:
    pooled = torch.randn(6, theirs.CHANNELS, 7, 7)
    objectness, deltas, scores, box_deltas = theirs.two_stage_outputs(state, features, pooled)
    ours = model.proposal_generator.rpn_head(features)
    assert_close(ours[0], objectness)
    assert_close(ours[1], deltas)
    box_features = model.roi_heads.box_head(pooled)
    assert_close(model.roi_heads.box_predictor(box_features), [scores, box_deltas])


def test_boxes_for_all_classes(resnet18_state):
    torch.manual_seed(2)
    heads = theirs.two_stage_state(agnostic=True)
    cfg, model = converted_model({**resnet18_state, **theirs.neck_state(R18_CHANNELS), **heads})
    assert cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    assert_two_stage(model, heads, [torch.randn(1, theirs.CHANNELS, 4, 4)])


@pytest.mark.parametrize(
    "name, keys",
    [
        ("resnet34", {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
        ("resnet50", {"DEPTH": 50}),
        ("resnet101", {"DEPTH": 101}),
        ("resnet152", {"DEPTH": 152}),
        ("resnext50_32x4d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
    ],
)
def test_every_depth_has_detectron2s_names(name, keys):
    with torch.device("meta"):
        backbone, shared = theirs.resnet(name), theirs.head_state("atss")
        channels = R18_CHANNELS if keys["DEPTH"] < 50 else R50_CHANNELS
        neck = theirs.neck_state(channels[1:], p6_channels=theirs.CHANNELS)
    assert_fits({**theirs.resnet_state(backbone), **neck, **shared}, keys)


def assert_fits(state: theirs.State, keys: dict) -> None:
    """The config has the keys below RESNETS, and its model the converted names and shapes."""
    conversion = convert_openmmlab(Checkpoint(state), style="pytorch", opts=["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_detector(conversion.cfg)
    assert {key: conversion.cfg.MODEL.RESNETS[key] for key in keys} == keys
    ours, expected = (
        {key: value.shape for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        for tensors in (conversion.state_dict, model.state_dict())
    )
    assert ours == expected


@torch.no_grad()
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolutions(modulated):
    """The second convolution of each block in C3 to C5 reads beside its cells, as does the converted one."""
    torch.manual_seed(0)
    original = theirs.resnet("resnet50")
    for stage in (original.layer2, original.layer3, original.layer4):
        for block in stage:
            block.conv2 = DeformableConv2d.like(block.conv2, modulated=modulated)
            nn.init.normal_(block.conv2.conv_offset.weight, std=0.02)
            nn.init.normal_(block.conv2.conv_offset.bias)
    state = {**theirs.resnet_state(original), **theirs.head_state("gfl")}
    state.update(theirs.neck_state(R50_CHANNELS[1:], p6_channels=theirs.CHANNELS))
    cfg, model = converted_model(state)
    node = cfg.MODEL.RESNETS
    assert node.DEFORM_ON_PER_STAGE == [False, True, True, True] and node.DEFORM_NUM_GROUPS == 1
    assert node.DEFORM_MODULATED == modulated
    image = torch.randn(1, 3, 64, 96)
    found = model.backbone.bottom_up(image)
    for name, expected in zip(("res3", "res4", "res5"), theirs.resnet_features(original, image)[1:]):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("modulated", [None, False, True])
def test_res2net(modulated, tmp_path, capsys):
    """OpenMMLab's Res2Net v1d has timm's tensors, but for the names in the stem."""
    timm = pytest.importorskip("timm", reason="timm is an extra of setup.py")
    torch.manual_seed(0)
    original = diversify(timm.create_model("res2net50d", features_only=True, out_indices=(2, 3, 4))).eval()
    if modulated is not None:
        for stage in (original.layer3, original.layer4):
            for convs in (block.convs for block in stage):
                for index, conv in enumerate(convs):
                    convs[index] = DeformableConv2d.like(conv, modulated=modulated)
                    nn.init.normal_(convs[index].conv_offset.weight, std=0.02)
    renamed = {name.replace("bn1", "stem.7") if name.startswith("bn1") else name: value
               for name, value in original.state_dict().items()}
    state = {f"backbone.{re.sub('^conv1', 'stem', name)}": value for name, value in renamed.items()}
    state.update(theirs.head_state("gflv2"))
    state.update(theirs.neck_state(R50_CHANNELS[1:], p6_channels=theirs.CHANNELS))
    cfg, model = convert_file(tmp_path, capsys, {"state_dict": state, "meta": {}}, "--style", "pytorch")
    node = cfg.MODEL.TIMM
    assert (node.NAME, node.DEFORM_MODULATED) == ("res2net50d", bool(modulated))
    assert node.DEFORM_ON_PER_STAGE == [False, False, modulated is not None, modulated is not None]
    image = torch.randn(1, 3, 64, 96)
    for found, expected in zip(model.backbone.bottom_up(image).values(), original(image)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    shallow = {name: value for name, value in state.items() if not name.startswith("backbone.layer3.5")}
    with pytest.raises(UserError, match=r"Res2Net of \(3, 4, 5, 3\) blocks, 26 channels and 4 scales with a deep"):
        convert_openmmlab(Checkpoint(shallow), style="pytorch")


@pytest.mark.parametrize("channels, modulated, groups", [(36, False, 2), (27 * 3, True, 3), (108, None, None)])
def test_groups_of_offsets(channels, modulated, groups):
    with torch.device("meta"):
        state = {**theirs.resnet_state(theirs.resnet("resnet50")), **theirs.head_state("gfl")}
        state.update(theirs.neck_state(R50_CHANNELS[1:], p6_channels=theirs.CHANNELS))
        for name in [name for name in state if "conv2.weight" in name and "layer4" in name]:
            offsets = name.replace("conv2.weight", "conv2.conv_offset")
            state[f"{offsets}.weight"] = torch.empty(channels, state[name].shape[1], 3, 3)
            state[f"{offsets}.bias"] = torch.empty(channels)
    if modulated is None:  # six groups of version 1 or four of version 2
        with pytest.raises(UserError, match="does not tell MODEL.RESNETS.DEFORM_MODULATED, .*NUM_GROUPS; append"):
            assert_fits(state, {})
        return
    stages = [False, False, False, True]
    keys = {"DEFORM_ON_PER_STAGE": stages, "DEFORM_MODULATED": modulated, "DEFORM_NUM_GROUPS": groups}
    assert_fits(state, keys)


# --- recorded numbers


@torch.no_grad()
def test_recorded_gflv2_head(tmp_path, capsys, gfl_state):
    """The recorded head of two levels, in a file with a random backbone."""
    case = recorded("ld", "head_forward_1_GFocalHead")
    state = {name: value for name, value in gfl_state.items() if "scales" in name or "bbox_head" not in name}
    for key in case.arrays:
        if key.startswith("in_w_"):
            state["bbox_head." + key[len("in_w_") :].replace("__", ".")] = case.tensor(key).float()
    cfg, model = convert_file(tmp_path, capsys, {"state_dict": state, "meta": {}}, "--style", "pytorch")
    assert cfg.MODEL.META_ARCHITECTURE == "GFLv2" and cfg.MODEL.GFL.NUM_CLASSES == 3
    assert cfg.MODEL.GFL.NUM_CONVS == 1 and cfg.MODEL.GFL.REG_MAX == 16
    logits, deltas = model.head([case.tensor(f"in_feat{level}").float() for level in range(2)])
    for level in range(2):
        flat = {"logits": logits[level].permute(0, 2, 3, 1), "deltas": deltas[level].permute(0, 2, 3, 1)}
        scores = model.class_scores(flat).permute(0, 3, 1, 2)
        found = {"joint_score": scores, "reg": deltas[level], "cls_logit": logits[level]}
        for name, value in found.items():
            torch.testing.assert_close(value, case.tensor(f"out_{name}{level}"), **case.data["tolerance"])


@torch.no_grad()
def test_recorded_retinanet_head(tmp_path, capsys, resnet18_state):
    """The recorded teacher finishes the recorded student's towers after block 3, as CrossKD does."""
    case = recorded("crosskd", "retinanet_main")
    state = {**resnet18_state, **theirs.neck_state(R18_CHANNELS[1:], p6_channels=512, channels=8)}
    for key in case.arrays:
        if key.startswith("teacher."):
            state["bbox_head." + key[len("teacher.") :]] = case.tensor(key)
    cfg, model = convert_file(tmp_path, capsys, {"state_dict": state, "meta": {}}, "--style", "pytorch")
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.MODEL.RETINANET.NUM_CONVS == 4
    for level in range(3):
        for part, tower, output in (("cls", "cls_subnet", "logits"), ("reg", "bbox_subnet", "deltas")):
            taps = [case.tensor(f"mid.{role}_{part}_tap.{level}") for role in ("student", "teacher")]
            feature = getattr(model.head, tower)[6:](align_statistics(*taps).relu())
            expected = to_size_outer(case.tensor(f"mid.crossed_{part}.{level}"), 3, 3, dim=1)
            torch.testing.assert_close(model.head.predict(output, [feature], level), expected)


class _Stages(Backbone):
    """Recorded C3 to C5."""

    def __init__(self, maps) -> None:
        super().__init__()
        self.maps = maps

    def output_shape(self):
        return {
            name: ShapeSpec(channels=x.shape[1], stride=2 ** int(name[-1])) for name, x in self.maps.items()
        }

    def forward(self, images):
        return self.maps


@torch.no_grad()
def test_recorded_pyramid():
    case = recorded("head", "fpn_s70")
    weights = {f"neck.{key[2:]}": case.tensor(key) for key in case.arrays if key.startswith("w.")}
    state, settings = pyramid(Tensors(weights, "the recording"), two_stage=False)
    assert settings["MODEL.FPN.TOP_BLOCK_IN_FEATURE"] == "res5" and settings["MODEL.FPN.OUT_CHANNELS"] == 4
    stages = _Stages({f"res{level}": case.tensor(f"c{level}") for level in (3, 4, 5)})
    model = nn.Module()
    model.backbone = FPN(stages, list(stages.maps), 4, top_block=LinearP6P7(6, 4, in_feature="res5"))
    model.load_state_dict(state)
    for name, value in model.backbone(torch.zeros(1)).items():
        torch.testing.assert_close(value, case.tensor(name), **case.data["tolerance"])


@torch.no_grad()
def test_recorded_box_head(tmp_path, capsys, resnet18_state):
    """RoI pooling from the recorded maps and both FC layers."""
    case = recorded("openmmlab", "faster_rcnn_box_head")
    state = {**resnet18_state, **theirs.neck_state(R18_CHANNELS, channels=8)}
    for name, channels in (("rpn_conv", 8), ("rpn_cls", 3), ("rpn_reg", 12)):
        size = 3 if name == "rpn_conv" else 1
        state[f"rpn_head.{name}.weight"] = torch.randn(channels, 8, size, size)
        state[f"rpn_head.{name}.bias"] = torch.zeros(channels)
    state.update({f"roi_head.{key}": case.tensor(key) for key in case.arrays if key.startswith("bbox_head.")})
    cfg, model = convert_file(tmp_path, capsys, {"state_dict": state}, "--style", "pytorch")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == case.data["num_classes"]
    assert cfg.MODEL.ROI_BOX_HEAD.FC_DIM == len(case.arrays["bbox_head.shared_fcs.0.bias"])
    heads = model.roi_heads
    assert [1 / pooler.spatial_scale for pooler in heads.box_pooler.level_poolers] == case.data["strides"]
    height, width = case.data["img_shape"]
    assert (case.tensor("boxes") <= torch.tensor([width, height] * 2)).all()
    maps = [case.tensor(f"p{level}") for level in range(2, 6)]
    pooled = heads.box_pooler(maps, [Boxes(case.tensor("boxes"))])
    hidden = []
    heads.box_head.fc2.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    torch.testing.assert_close(heads.box_head(pooled), case.tensor("fc2"), **case.data["tolerance"])
    torch.testing.assert_close(hidden[0], case.tensor("fc1"), **case.data["tolerance"])
    assert not case.unread()


# --- what only the training config tells


TEXT = """
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', depth=101, norm_cfg=dict(type='BN', requires_grad=False), style='{style}'),
    neck=dict(type='FPN', add_extra_convs=True, relu_before_extra_convs={relu}),
    bbox_head=dict(type='FCOSHead', {options}
        bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0])))
img_norm_cfg = dict(
    mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], {colour})
train_pipeline = [
    dict(
        type='Normalize',
        mean=[102.9801, 115.9465,
              122.7717],
        std=[1.0, 1.0, 1.0],
        {colour})
]
"""


@pytest.mark.parametrize(
    "key, colour, options, distances, centerness_on, radius",
    [
        ("config", "to_rgb=False", "", "exp", "cls", 0.0),
        ("cfg", "bgr_to_rgb=True", "norm_on_bbox=True, centerness_on_reg=True,", "relu", "box", 0.0),
        ("cfg", "bgr_to_rgb=True", "center_sampling=True, center_sample_radius=2.5,", "exp", "cls", 2.5),
    ],
)
def test_config_in_the_checkpoint(
    tmp_path, resnet18_state, key, colour, options, distances, centerness_on, radius
):
    text = TEXT.format(style="caffe", relu=True, options=options, colour=colour)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": {key: text}}, tmp_path / "x.pth")
    neck = theirs.neck_state(R18_CHANNELS[1:], p6_channels=theirs.CHANNELS)
    state = {**resnet18_state, **neck, **theirs.head_state("fcos")}
    cfg = convert_openmmlab(Checkpoint(state, read_checkpoint(str(tmp_path / "x.pth")).config_text)).cfg
    assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717] and cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    assert cfg.INPUT.FORMAT == ("RGB" if "True" in colour else "BGR")
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.FPN.TOP_BLOCK_RELU
    assert cfg.MODEL.FCOS.DISTANCES == distances and cfg.MODEL.FCOS.CENTERNESS_ON == centerness_on
    assert cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS == radius


def test_what_contradicts_itself_is_asked_for(gfl_state):
    text = TEXT.format(style="pytorch", relu=False, options="", colour="to_rgb=False")
    text += "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[1.0, 1.0, 1.0], to_rgb=True)"
    with pytest.raises(UserError, match="does not tell MODEL.PIXEL_MEAN, INPUT.FORMAT; append them"):
        convert_openmmlab(Checkpoint(gfl_state, text))
    cfg = convert_openmmlab(Checkpoint(gfl_state, text), style="pytorch", opts=["INPUT.FORMAT", "BGR"]).cfg
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375] and cfg.INPUT.FORMAT == "BGR"


# --- files


class _Log:
    """An object of the trainer; unpickled by name it would leave a file behind."""

    def __reduce__(self):
        return _touch, (os.environ["D2_DISTILL_TOUCHED"],)


def _touch(path: str) -> "_Log":
    Path(path).touch()
    return _Log()


@pytest.mark.parametrize("zip_format", [True, False])
def test_reads_tensors_and_runs_nothing(tmp_path, monkeypatch, zip_format):
    monkeypatch.setenv("D2_DISTILL_TOUCHED", str(tmp_path / "touched"))
    state = {"a": torch.rand(3, 4).t(), "b": nn.Parameter(torch.rand(2)), "c": torch.tensor(3)}
    state["d"] = torch.ones(2, dtype=torch.float16)
    meta = {"cfg": "style='caffe'", "seeds": {1}, "time": np.float64(3.0)}
    content = {"state_dict": state, "message_hub": {"log": [_Log()]}, "meta": meta}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zip_format)
    checkpoint = read_checkpoint(str(tmp_path / "x.pth"))
    assert not (tmp_path / "touched").exists()
    assert checkpoint.config_text == "style='caffe'" and list(checkpoint.state_dict) == list(state)
    for name, value in state.items():
        torch.testing.assert_close(checkpoint.state_dict[name], value.data, rtol=0, atol=0)


@pytest.mark.parametrize(
    "meta_of",
    [lambda names: {"CLASSES": tuple(names)}, lambda names: {"dataset_meta": {"classes": names}, "CLASSES": ["x"]}],
)
def test_class_names(tmp_path, gfl_state, meta_of):
    """Those of MMDetection 2.x and 3.x, unless they are not those of the head."""
    number = convert_openmmlab(Checkpoint(gfl_state), style="pytorch").cfg.MODEL.GFL.NUM_CLASSES
    names = [f"class {index}" for index in range(number)]
    for held, expected in ((names, tuple(names)), (names[1:], ()), (names[1:] + names[1:2], ())):
        torch.save({"state_dict": gfl_state, "meta": meta_of(held)}, tmp_path / "x.pth")
        conversion = convert_openmmlab(read_checkpoint(str(tmp_path / "x.pth")), style="pytorch")
        assert conversion.cfg.DATASETS.CLASSES == expected
        assert ("DATASETS" in yaml.safe_load(conversion.yaml())) == bool(expected)


def _without(state, *words):
    return {name: value for name, value in state.items() if not any(word in name for word in words)}


def test_refused_checkpoints(tmp_path, gfl_state):
    one = torch.zeros(1)
    wrong = {
        "unknown": (
            {**gfl_state, "bbox_head.atss_iou.weight": one, "teacher.x": one},
            r"has 2 tensors that no detector .* \(bbox_head.atss_iou.weight, teacher.x\)",
        ),
        "incomplete": (
            _without(gfl_state, "reg_convs.1", "layer3.1.bn2.bias"),
            "as GFL: .*ours.pth does not fit .*4 missing: .*res4.1.conv2.norm.bias.*bbox_subnet.3",
        ),
        "shapeless": (_without(gfl_state, "gfl_reg"), "lacks bbox_head.gfl_reg.weight"),
        "headless": (_without(gfl_state, "bbox_head"), "is of no detector that can be converted"),
        "other_backbone": (_without(gfl_state, "layer2.1"), r"backbone with \(2, 1, 2, 2\) basic blocks"),
        "other_pyramid": (_without(gfl_state, "fpn_convs.4"), "3 lateral and 4 output convolutions"),
        "other_anchors": (
            {
                "bbox_head.retina_cls.weight": torch.zeros(3, 32, 3, 3),
                "bbox_head.retina_reg.weight": torch.zeros(4, 32, 3, 3),
            },
            "3 class and 4 box channels, which are not of 9 anchors a cell",
        ),
        "plain": (None, "has no weights under 'state_dict'"),
        "strange": ({"a": 3}, "holds 1 entries that are no plain tensors, such as a"),
    }
    for name, (state, message) in wrong.items():
        path = tmp_path / f"{name}.pth"
        torch.save({"model": gfl_state} if state is None else {"state_dict": state}, path)
        with pytest.raises(UserError, match=message):
            run([str(path), str(tmp_path / "ours.pth"), "--style", "pytorch"])
    assert not (tmp_path / "ours.pth").exists()


def test_refused_arguments(tmp_path, gfl_state):
    good, out = str(tmp_path / "gfl.pth"), str(tmp_path / "ours.pth")
    torch.save({"state_dict": gfl_state}, good)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "taken.pth").write_text("mine")
    for arguments, message in (
        ([good, str(tmp_path / "ours.pkl")], "must end with .pth"),
        ([good, str(tmp_path / "taken.pth")], "exists already"),
        ([good, out, "--style", "pytorch", "MODEL.GFL.NORM"], "is an odd number of words"),
        ([good, out], "does not tell MODEL.PIXEL_MEAN, .*STD, INPUT.FORMAT, MODEL.RESNETS.STRIDE_IN_1X1;"),
        ([good, out, "--style", "pytorch", "MODEL.GFL.NEW", "1"], "KEY VALUE is not valid: .*MODEL.GFL.NEW"),
        ([good, out, "--style", "pytorch", "DATASETS.CLASSES", "('cat',)"], "CLASSES has 1 names, but .* classes; name"),
        ([str(tmp_path / "text.pth"), out], "text.pth cannot be read as a checkpoint"),
        ([str(tmp_path / "absent.pth"), out], "there is no file .*absent.pth"),
    ):
        with pytest.raises(UserError, match=message):
            run(arguments)
    assert not (tmp_path / "ours.pth").exists() and (tmp_path / "taken.pth").read_text() == "mine"


def test_command_line(tmp_path):
    assert "MODEL.FCOS.DISTANCES exp" in tool.parser().format_help()
    command = [sys.executable, str(ROOT / "tools" / "convert_openmmlab.py"), "absent.pth", "out.pth"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: The checkpoint: there is no file absent.pth")
    assert len(refused.stderr.splitlines()) == 1 and not refused.stdout

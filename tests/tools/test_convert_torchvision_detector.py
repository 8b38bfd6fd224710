"""tools/convert_torchvision_detector.py: converted models compute what torchvision's do; what is refused."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn
from torchvision.models import detection
from torchvision.models.detection._utils import overwrite_eps

from d2_distill.apps.conversion.torchvision import convert_torchvision, kept_classes, read_state_dict
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.building import build_detector
from d2_distill.errors import UserError
from d2_distill.staged import stage_detector

from . import conversions
from .torchvision_pairs import PROPOSALS, Pair, assert_same_detections, build, small

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert_torchvision_detector as tool  # noqa: E402

run = partial(conversions.run, tool)
convert_file = partial(conversions.convert_file, tool)

ONE_STAGE = ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"]
TWO_STAGE = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"]


@pytest.fixture(scope="module", params=ONE_STAGE)
def one_stage(request) -> Pair:
    model = build(request.param, num_outputs=4)
    return Pair.of(model, model.state_dict())


@pytest.fixture(scope="module", params=TWO_STAGE)
def two_stage(request) -> Pair:
    model = build(request.param, num_outputs=4)
    return Pair.of(model, model.state_dict(), opts=["MODEL.RPN.POST_NMS_TOPK_TEST", PROPOSALS])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
def assert_same_features(pair: Pair) -> None:
    theirs = pair.theirs.backbone(pair.their_images().tensors)
    assert len(theirs) == len(pair.features)
    for ours, expected in zip(pair.features.values(), theirs.values()):
        assert_close(ours, expected)


@torch.no_grad()
def test_one_stage_outputs_and_anchors(one_stage):
    assert_same_features(one_stage)
    theirs, images = one_stage.theirs, one_stage.their_images()
    maps = list(one_stage.features.values())
    run = stage_detector(one_stage.ours).run(one_stage.our_images())
    anchors, levels = run.grid.boxes, run.grid.level_boxes()
    per_side = 1 if "fcos" in type(theirs).__name__.lower() else 3
    expected = theirs.head(maps)
    boxes = theirs.anchor_generator(images, maps)[0]
    assert torch.equal(anchors, in_our_order(boxes, per_side))
    # The last levels' cells are no stride apart.
    assert levels[-2].tensor[:, ::2].mean(dim=1).unique().tolist() == [0.0, 64.0]
    assert levels[-2].tensor[:, 1::2].mean(dim=1).unique().tolist() == [0.0, 48.0]

    logits = in_our_order(expected["cls_logits"], per_side)[..., 1:]  # the background is dropped
    assert_close(run.outputs["logits"], logits)
    deltas = run.outputs["deltas"]
    if per_side == 1:
        deltas = deltas.relu()  # in the decoding
        assert_close(run.outputs["centerness"], expected["bbox_ctrness"])
    assert_close(deltas, in_our_order(expected["bbox_regression"], per_side))


def in_our_order(rows: torch.Tensor, per_side: int) -> torch.Tensor:
    """(..., R, K) with the anchors of each cell by size, then ratio."""
    cells = rows.unflatten(-2, (-1, per_side**2))
    return to_size_outer(cells, per_side, per_side, dim=cells.dim() - 2).flatten(-3, -2)


def test_one_stage_detections(one_stage):
    assert_same_detections(one_stage)


@torch.no_grad()
def test_two_stage_outputs_and_proposals(two_stage):
    assert_same_features(two_stage)
    theirs, ours = two_stage.theirs, two_stage.ours
    maps = list(two_stage.features.values())
    for found, expected in zip(ours.proposal_generator.rpn_head(maps), theirs.rpn.head(maps)):
        for a, b in zip(found, expected):
            assert_close(a, b)
    anchors = ours.proposal_generator.anchor_generator(maps)
    expected = theirs.rpn.anchor_generator(two_stage.their_images(), maps)[0]
    assert torch.equal(torch.cat([boxes.tensor for boxes in anchors]), expected)

    boxes = [torch.tensor([[3.0, 4.0, 60.0, 44.0], [10.5, 0.0, 20.0, 30.25], [0.0, 0.0, 128.0, 96.0]])] * 2
    named = {str(level): x for level, x in enumerate(maps[:4])}
    pooled = theirs.roi_heads.box_roi_pool(named, boxes, two_stage.their_images().image_sizes)
    heads = ours.roi_heads
    assert_close(heads.box_pooler(maps[:4], [Boxes(x) for x in boxes]), pooled)
    scores, deltas = heads.box_predictor(heads.box_head(pooled))
    their_scores, their_deltas = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
    assert_close(scores, their_scores[:, [1, 2, 3, 0]])
    assert_close(deltas, their_deltas[:, 4:])


def test_two_stage_detections(two_stage):
    assert_same_detections(two_stage)


# --- published files: names of older modules, eps 0, COCO's numbers


def older_names(state):
    """As of torchvision before 0.13."""
    rename = (
        (r"(fpn\.\w+_blocks\.\d+)\.0\.", r"\1."),
        (r"(rpn\.head\.conv)\.0\.0\.", r"\1."),
        (r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda match: f"{match[1]}.{2 * int(match[2])}."),
    )
    renamed = {}
    for name, value in state.items():
        for pattern, new in rename:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """Faster R-CNN as COCO_V1 files are, but for the depth: small variances show the eps."""
    model = small("fasterrcnn", num_outputs=91)
    overwrite_eps(model, 0.0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var") and buffer.numel() > 64:
                buffer.view(-1)[::7] = 3e-6
                model.get_submodule(name[: -len(".running_var")]).weight.view(-1)[::7] = 1e-3
    return model


def test_published_faster_rcnn(published, tmp_path, capsys):
    state = {f"module.{name}": value for name, value in older_names(published.state_dict()).items()}
    assert "module.rpn.head.conv.weight" in state and "module.backbone.fpn.inner_blocks.0.weight" in state
    content = {"model": state, "epoch": 26, "args": argparse.Namespace(lr=0.02)}
    cfg, model = convert_file(tmp_path, capsys, content, "MODEL.RPN.NMS_THRESH", "0.7")
    assert cfg.MODEL.RESNETS.DEPTH == 18 and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80 and cfg.INPUT.FORMAT == "RGB"
    assert cfg.INPUT.MIN_SIZE_TEST == 800 and cfg.INPUT.MAX_SIZE_TEST == 1333
    names = cfg.DATASETS.CLASSES
    assert (names[0], names[11], names[79], len(names)) == ("person", "stop sign", "toothbrush", 80)
    pair = Pair(published, model, cfg)
    assert_same_features(pair)
    assert_same_detections(pair)


def test_eps_is_asked_for(tmp_path):
    model = small("retinanet", num_outputs=4)
    with pytest.raises(UserError, match="does not tell the eps of its frozen .* --frozen-bn-eps 0 if .* 1e-05"):
        convert_torchvision(model.state_dict())
    for eps in (0.0, 1e-5):
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.eps = eps
        pair = Pair.of(model, older_names(model.state_dict()), frozen_bn_eps=eps, classes=["a", "b", "c"])
        assert_same_features(pair)
    assert_same_detections(pair)
    assert list(pair.cfg.DATASETS.CLASSES) == ["a", "b", "c"]
    assert pair.cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE == "p5"


@torch.no_grad()
def test_labels_that_began_with_0():
    """As many names as outputs: none is the background."""
    model = small("fcos", num_outputs=3)
    pair = Pair.of(model, model.state_dict(), classes=["a", "b", "c"])
    logits = stage_detector(pair.ours).run(pair.our_images()).outputs["logits"]
    assert_close(logits, model.head(list(pair.features.values()))["cls_logits"])


@pytest.mark.parametrize(
    "backbone, keys",
    [
        ("resnet34", {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
        ("resnet101", {"DEPTH": 101}),
        ("resnext50_32x4d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        ("wide_resnet50_2", {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 128}),
    ],
)
def test_other_resnets(backbone, keys):
    with torch.device("meta"):
        body = detection.backbone_utils.resnet_fpn_backbone(backbone_name=backbone, weights=None)
        state = detection.FasterRCNN(body, 4).state_dict()
        conversion = convert_torchvision(state, frozen_bn_eps=1e-5, opts=["MODEL.DEVICE", "meta"])
        model = build_detector(conversion.cfg)
    assert {key: conversion.cfg.MODEL.RESNETS[key] for key in keys} == keys
    both = (conversion.state_dict, model.state_dict())
    ours, expected = ({name: value.shape for name, value in tensors.items()} for tensors in both)
    assert ours == expected


# --- what is refused


def test_class_names_that_do_not_fit():
    for names, softmax, message in (
        (["a", "b"], True, "has 2 names, but x has 4 class outputs, of which the first is .*; give 3 names"),
        (["a", "b", "c", "d"], True, "give 3 names\\."),
        (["a", "b"], False, "give 3 names, or 4 if its labels began with 0"),
        (["a", "a", "b"], True, "'a' twice"),
    ):
        with pytest.raises(UserError, match=message):
            kept_classes(4, names, source="x", softmax=softmax)
    with pytest.raises(UserError, match="has 1 class output, .* name it by --classes"):
        kept_classes(1, [], source="x", softmax=False)
    assert kept_classes(1, ["a"], source="x", softmax=False).outputs == [0]


_ONE = torch.zeros(1)
_DENSE = {
    "head.classification_head.cls_logits.weight": torch.zeros(8, 32, 3, 3),
    "head.regression_head.bbox_reg.weight": torch.zeros(4, 32, 3, 3),
}
_RPN = {"roi_heads.box_predictor.cls_score.weight": _ONE, "rpn.head.cls_logits.weight": torch.zeros(15, 32, 1, 1)}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"roi_heads.mask_predictor.mask_fcn_logits.weight": _ONE, **_RPN}, "a Mask R-CNN; only detectors of boxes"),
        ({"roi_heads.keypoint_head.0.weight": _ONE, **_RPN}, "a Keypoint R-CNN; only detectors of boxes"),
        ({"backbone.body.0.0.weight": _ONE, **_RPN}, "a detector on MobileNet; only ResNets"),
        ({"head.classification_head.module_list.0.weight": _ONE}, "an SSD; only RetinaNet"),
        ({"bbox_head.atss_cls.weight": _ONE}, "OpenMMLab; convert it with tools/convert_openmmlab.py"),
        ({"conv1.weight": _ONE, "fc.weight": _ONE}, "a classifier; tools/convert_torchvision_backbone.py makes"),
        ({"weight": _ONE}, "is of no detector that can be converted; those are RetinaNet, FCOS and Faster"),
        (_DENSE, "has 8 class and 4 box channels, which are not of 9 anchors a cell"),
        (_RPN, "has 15 anchors a cell; only torchvision's own, of 1 size and 3 ratios"),
        ({"epoch": 3}, "holds no state dict of a detector, plain or under model, state_dict"),
        (nn.Linear(1, 1), "holds no state dict of a detector"),
        (b"text", "cannot be read as a checkpoint"),
    ],
)
def test_refused_files(tmp_path, content, message):
    path = tmp_path / "theirs.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        run([str(path), str(tmp_path / "ours.pth")])
    assert not (tmp_path / "ours.pth").exists()


def test_refused_tensors(tmp_path):
    with torch.device("meta"):
        state = small("fcos", num_outputs=4).state_dict()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}
    without = {name: value for name, value in state.items() if "cls_logits.bias" not in name}
    five = {**state, "backbone.fpn.inner_blocks.3.0.weight": torch.zeros(256, 64, 1, 1)}
    batch_norm = {**state, "backbone.body.bn1.num_batches_tracked": torch.tensor(1)}
    for tensors, arguments, message in (
        ({**state, "head.iou.weight": _ONE}, [], r"has 1 tensors that no detector .* \(head.iou.weight\)"),
        (without, [], "as TorchvisionFCOS: .*ours.pth does not fit .*1 missing: head.cls_score.bias"),
        (five, [], "has a pyramid with 4 lateral and 5 output convolutions"),
        (batch_norm, ["--frozen-bn-eps", "0"], "has no frozen batch norms; leave out --frozen-bn-eps"),
        (state, ["MODEL.FCOS.NUM_CONVS"], "is an odd number of words"),
        (state, ["MODEL.FCOS.NUM_CONVS", "2"], "as TorchvisionFCOS: .* does not fit .*16 unexpected: head.cls_subnet.6.weight"),
    ):
        torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
        with pytest.raises(UserError, match=message):
            run([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth"), *arguments])
    assert not (tmp_path / "ours.pth").exists()


def test_reads_state_dicts_of_trainers(tmp_path):
    state = {"_orig_mod.module.a.weight": torch.ones(2)}
    for content in (state, {"model": state, "epoch": 1}, {"model_state_dict": state, "optimizer": {}}):
        torch.save(content, tmp_path / "x.pth")
        assert list(read_state_dict(str(tmp_path / "x.pth"))) == ["a.weight"]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_torchvision", str(tmp_path / "absent.pth"), str(tmp_path / "out.pth")])
    with pytest.raises(SystemExit, match=r"^error: The checkpoint: there is no file \S*absent.pth; [^\n]*$"):
        tool.main()
    assert "--frozen-bn-eps 0" in tool.parser().format_help()
    assert not capsys.readouterr().out

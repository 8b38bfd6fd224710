"""Checks of whole models: their configs, names, initialisation, features, losses, gradients and detections."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import FCOS, FPN, build_model, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.config.model_zoo import find_config

from ..cases import Case, fill_parameters, golden_gt, golden_image
from ..recording import plain
from .d2_left_out import is_left_out
from .d2_modeling import close

BASELINES = Path(__file__).parents[3] / "configs" / "baselines"
ZOO_BASES = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "frcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}


def zoo_model(base_config, overrides):
    cfg = get_cfg()
    cfg.merge_from_file(str(BASELINES / base_config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return build_model(cfg)


def fcos_model(
    depth=50, out_ch=256, convs=4, nc=80, norm="GN", radius=1.5, score=0.2, nms=0.6, freeze=0, topk=1000, dets=100,
    stride_in_1x1=None, pixel_mean=(103.53, 116.28, 123.675), pixel_std=(1.0, 1.0, 1.0),
):
    """The FCOS of the recordings (README of the suite), which has no config file."""
    names = ["res3", "res4", "res5"]
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256 if depth >= 50 else 64,
        "MODEL.RESNETS.OUT_FEATURES", names, "MODEL.BACKBONE.FREEZE_AT", freeze,
        "MODEL.RESNETS.STRIDE_IN_1X1", depth >= 50 if stride_in_1x1 is None else stride_in_1x1,
    ])
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    top_block = LastLevelP6P7(out_ch, out_ch, in_feature="p5")
    return FCOS(
        backbone=FPN(bottom_up, in_features=names, out_channels=out_ch, top_block=top_block),
        head=FCOSHead(
            input_shape=[ShapeSpec(channels=out_ch)] * 5,
            num_classes=nc,
            conv_dims=[out_ch] * convs,
            norm=norm,
        ),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=nc,
        center_sampling_radius=radius,
        test_score_thresh=score,
        test_nms_thresh=nms,
        test_topk_candidates=topk,
        max_detections_per_image=dets,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def described_model(description: Mapping[str, Any], overrides: Sequence[Any] = ()) -> nn.Module:
    """The model that a case describes, by a config of the zoo or by the arguments of an FCOS.

    Args:
        overrides: further ones of the config.
    """
    if "base_config" in description:
        return zoo_model(description["base_config"], [*plain(description["overrides"]), *overrides])
    # Arguments may stand beside the others.
    beside = {key: value for key, value in description.items() if key != "fcos_args"}
    return fcos_model(**plain(description["fcos_args"]), **plain(beside))


def fcos_built_as(text: str) -> nn.Module:
    """The FCOS of the README; what differs from it follows the text as "name=value"."""
    remark, *arguments = re.split(r"[,;(]\s*", text.rstrip(")"))
    assert remark == "see README"
    arguments = [argument for argument in arguments if argument != "FCOS"]
    return fcos_model(**{name: ast.literal_eval(value) for name, value in (x.split("=") for x in arguments)})


def check_init_stats(case: Case) -> None:
    """The keys name the models; one that is of a head alone is called so."""
    for key in case.data:
        kind, depth = re.fullmatch(r"(retinanet|frcnn|fcos)_r(\d+)(?:_head)?", key).groups()
        torch.manual_seed(0)
        if kind == "fcos":
            model = fcos_model(depth=int(depth))
        else:
            narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if int(depth) < 50 else []
            model = zoo_model(ZOO_BASES[kind], ["MODEL.RESNETS.DEPTH", int(depth), *narrow])
        parameters = dict(model.named_parameters())
        for parameter, stats in case.data[key].items():
            value = parameters[parameter].detach().double()
            assert value.numel() == stats["n"]
            measured = [value.mean().item(), value.std().item() if value.numel() > 1 else 0.0]
            # recorded with 5 digits
            assert measured == pytest.approx([stats["mean"], stats["std"]], rel=1e-4, abs=1e-9), parameter


def check_state_dict_shapes(case: Case) -> None:
    data = case.data
    if "base" in data:
        model = zoo_model(ZOO_BASES[data["base"]], plain(data["config_overrides"]))
    else:
        model = fcos_built_as(data["built_as"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == data["state_dict"]
    assert list(shapes) == list(data["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == data["num_params"]
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    if "frozen_parameters" in data:
        assert frozen == data["frozen_parameters"]
    if "trainable" in data:
        assert len(list(model.parameters())) - len(frozen) == data["trainable"]


def flat(node, prefix=""):
    """The config as ``{"A.B.C": value}``, tuples as lists."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def check_config_zoo_diffs(case: Case) -> None:
    default = dict(flat(get_cfg()))
    for config in case.data:
        cfg, path = get_cfg(), BASELINES / config
        if not path.exists():
            if is_left_out(case, "mask heads", config):
                continue
            path = find_config(config, key=config)
        cfg.merge_from_file(str(path))
        expected = case.data[config]
        changed = {key: value for key, value in flat(cfg) if value != default[key]}
        assert set(changed) == set(expected), config
        for key, value in expected.items():
            if key.endswith("ANCHOR_GENERATOR.SIZES"):
                close(changed[key], value)
            else:
                assert changed[key] == value, (config, key)


def _batch(case: Case) -> list[dict[str, Any]]:
    """The images and the ground truth that belong to the case's tag."""
    data, arrays, batch = case.data, case.arrays, []
    for i, ((h, w), n) in enumerate(zip(data["image_sizes_hw"], data["num_gt"])):
        tag = f"{data['case']}:{i}"
        boxes, classes = golden_gt(tag, n, h, w, data["num_classes"])
        close(boxes, arrays[f"gt_boxes_{i}"])
        close(classes, arrays[f"gt_classes_{i}"])
        instances = Instances((h, w), gt_boxes=Boxes(boxes), gt_classes=classes)
        batch.append({"image": golden_image(tag, h, w), "instances": instances, "height": 2 * h,
                      "width": int(1.5 * w), "image_id": i})
    return batch


def _check_map(value, arrays, key) -> None:
    """A map against ``<key>``, or ``<key>_every<n>`` of every n-th element; some are not recorded at all."""
    if key in arrays:
        close(value, arrays[key], rtol=1e-4, atol=1e-4)
    for name in arrays:
        step = re.fullmatch(rf"{key}_every(\d+)", name)
        if step:
            close(value.flatten()[:: int(step[1])], arrays[name], rtol=1e-4, atol=1e-4)


def _check_levels(levels, arrays, key):
    for level, value in enumerate(levels):
        _check_map(value, arrays, f"{key}_{level}")


def _check_eval(model, batch, data, arrays):
    images = model.preprocess_image(batch)
    assert list(images.tensor.shape) == data["padded_tensor_shape"]
    features = model.backbone(images.tensor)
    assert list(features) == list(data["features"])
    for key, expected in data["features"].items():
        value = features[key]
        assert list(value.shape) == expected["shape"]
        stats = [value.mean(), value.std(), value.abs().sum()]
        close(stats, [expected[key] for key in ("mean", "std", "abssum")], rtol=1e-4)
        _check_map(value, arrays, f"feat_{key}")

    if hasattr(model, "proposal_generator"):
        rpn = model.proposal_generator
        logits, deltas = rpn.rpn_head([features[key] for key in rpn.in_features])
        _check_levels(logits, arrays, "rpn_logits")
        _check_levels(deltas, arrays, "rpn_deltas")
        for i, proposals in enumerate(rpn(images, features)[0]):
            close(proposals.proposal_boxes.tensor, arrays[f"proposals_{i}"], atol=1e-2)
            close(proposals.objectness_logits, arrays[f"proposal_logits_{i}"], atol=1e-4)
    else:
        levels = [features[key] for key in model.head_in_features]
        anchors = model.anchor_generator(levels)
        assert [len(boxes) for boxes in anchors] == data["anchors_per_level"]
        for key, value in zip(("head_cls", "head_reg", "head_ctr"), model.head(levels)):
            _check_levels(value, arrays, key)

    for i, output in enumerate(model(batch)):
        result, expected = output["instances"], data["detections"][i]
        assert len(result) == expected["count"] and list(result.image_size) == expected["image_size"]
        close(result.pred_boxes.tensor, arrays[f"det_boxes_{i}"], atol=1e-2)
        close(result.scores, arrays[f"det_scores_{i}"], atol=1e-4)
        assert result.pred_classes.tolist() == arrays[f"det_classes_{i}"].tolist()


def _check_noise(model, batch, arrays, key, expected):
    """Whether the detections are those of the recording if all weights are a little off, in so many runs."""
    (size,) = re.fullmatch(r"same_detections_under_([\d.e-]+)_relative_weight_noise", key).groups()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for run in range(len(expected)):
        generator = torch.Generator().manual_seed(run)
        model.load_state_dict({
            name: value * (1 + float(size) * torch.randn(value.shape, generator=generator))
            if value.is_floating_point() else value
            for name, value in state.items()
        })
        classes = [output["instances"].pred_classes.tolist() for output in model(batch)]
        found.append(classes == [arrays[f"det_classes_{i}"].tolist() for i in range(len(batch))])
    model.load_state_dict(state)
    assert found == expected


def _check_training_step(model, batch, expected):
    model.zero_grad()
    with EventStorage(0) as storage:
        losses = model(batch)
    sum(losses.values()).backward()
    assert set(losses) == set(expected["losses"])
    for key, value in expected["losses"].items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4), key
    scalars = {key: value for key, (value, _) in storage.latest().items()}
    assert scalars == pytest.approx(plain(expected["storage_scalars"]), rel=1e-6)
    if "grad_l2_norm" in expected:
        norms = {key: None if p.grad is None else p.grad.norm().item() for key, p in model.named_parameters()}
        assert [key for key in norms if norms[key] is None] == expected["parameters_without_grad"]
        assert list(norms) == list(expected["grad_l2_norm"])
        for key, value in expected["grad_l2_norm"].items():
            assert (norms[key] is None) == (value is None), key
            if value is not None:
                assert norms[key] == pytest.approx(value, rel=1e-3, abs=1e-7), key


def check_model(case: Case) -> None:
    data, arrays = case.data, case.arrays
    model = described_model(data["description"])
    fill_parameters(model, data["salt"])
    batch = _batch(case)
    model.eval()
    with torch.no_grad():
        _check_eval(model, batch, data, arrays)
        for key in (key for key in data if key.startswith("same_detections_")):
            _check_noise(model, batch, arrays, key, data[key])
    model.train()
    for expected in data["training_steps"]:
        _check_training_step(model, batch, expected)
    if "loss_normalizer_after" in data:
        assert model.loss_normalizer == pytest.approx(data["loss_normalizer_after"])


CHECKS = {
    "init_stats": check_init_stats,
    "state_dict_shapes": check_state_dict_shapes,
    "config_zoo_diffs": check_config_zoo_diffs,
    "models": check_model,
}

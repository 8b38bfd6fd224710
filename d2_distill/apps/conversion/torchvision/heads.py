"""RetinaNet's, FCOS's and Faster R-CNN's heads: our names of their tensors, and what their shapes tell.

Names of both versions of torchvision's modules are known: published files are older than ``conv.0.0.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....detectors.anchor_order import to_size_outer
from ....errors import UserError
from .. import Converted, Tensors, faster_rcnn_settings
from .classes import Classes, kept_classes

# RetinaNet's anchors of a cell, and the sides of their squares, in whole pixels.
NUM_SIZES = NUM_RATIOS = 3
_SIZES = [[int(2**level * 2 ** (octave / 3)) for octave in range(NUM_SIZES)] for level in range(5, 10)]
_TOWERS = (("classification_head", "cls_subnet"), ("regression_head", "bbox_subnet"))
_ANCHORS = {"MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator"}


def heads(tensors: Tensors, names: Sequence[str]) -> tuple[Converted, Classes]:
    """Take whatever heads there are.

    Args:
        names: of the classes, or none.

    Raises:
        UserError: there are none that can be converted, or see :func:`kept_classes`.
    """
    if tensors.names(r"roi_heads\.box_predictor\.cls_score\.weight"):
        return _two_stage_heads(tensors, names)
    if tensors.names(r"head\.regression_head\.bbox_ctrness\.weight"):
        return _dense_head(tensors, names, node="FCOS", num_sizes=1, num_ratios=1)
    if tensors.names(r"head\.classification_head\.cls_logits\.weight"):
        return _dense_head(tensors, names, node="RETINANET", num_sizes=NUM_SIZES, num_ratios=NUM_RATIOS)
    raise UserError(
        f"{tensors.source} is of no detector that can be converted; those are RetinaNet, FCOS and Faster R-CNN of "
        "torchvision.models.detection."
    )


def _dense_head(
    tensors: Tensors, names: Sequence[str], *, node: str, num_sizes: int, num_ratios: int
) -> tuple[Converted, Classes]:
    num_anchors = num_sizes * num_ratios
    logits = tensors.shape(r"head\.classification_head\.cls_logits\.weight")[0]
    box_channels = tensors.shape(r"head\.regression_head\.bbox_reg\.weight")[0]
    if box_channels != 4 * num_anchors or logits % num_anchors:
        raise UserError(
            f"{tensors.source} has {logits} class and {box_channels} box channels, which are not of {num_anchors} "
            "anchors a cell; only torchvision's own anchors can be converted."
        )
    num_outputs = logits // num_anchors
    classes = kept_classes(num_outputs, names, source=tensors.source, softmax=False)
    tower = _tower_layers(tensors)
    norm = "GN" if any(len(shape) == 1 for shape in tower.values()) else ""
    settings: dict[str, Any] = {
        f"MODEL.{node}.NUM_CLASSES": len(classes.outputs),
        f"MODEL.{node}.NUM_CONVS": sum(len(shape) == 4 for shape in tower.values()),
        f"MODEL.{node}.NORM": norm,
    }
    if node == "RETINANET":
        settings = {
            "MODEL.META_ARCHITECTURE": "TorchvisionRetinaNet",
            **_ANCHORS,
            "MODEL.ANCHOR_GENERATOR.SIZES": _SIZES,
            **settings,
            "TEST.DETECTIONS_PER_IMAGE": 300,
        }
    else:
        settings = {"MODEL.META_ARCHITECTURE": "TorchvisionFCOS", **settings}

    converted = tensors.take(_dense_rules(tower))
    for name, tensor in converted.items():
        if name.startswith("head.cls_score."):
            tensor = classes.select(tensor, num_outputs, blocks=num_anchors)
        if name.startswith(("head.cls_score.", "head.bbox_pred.")):
            converted[name] = to_size_outer(tensor, num_sizes, num_ratios)
    if norm:
        _add_biases(converted, settings[f"MODEL.{node}.NUM_CONVS"])
    return (converted, settings), classes


def _tower_layers(tensors: Tensors) -> dict[str, torch.Size]:
    """Layer of the class tower, such as "0" or "0.0" -> shape of its weight: 4 dimensions, or 1 of a norm."""
    prefix, suffix = "head.classification_head.conv.", ".weight"
    layers = tensors.names(r"head\.classification_head\.conv\.\d+(\.[01])?\.weight")
    order = sorted(layers, key=lambda name: [int(part) for part in name[len(prefix) : -len(suffix)].split(".")])
    return {name[len(prefix) : -len(suffix)]: tensors.left[name].shape for name in order}


def _dense_rules(tower: dict[str, torch.Size]) -> Iterator[tuple[str, str]]:
    per_block = 3 if any(len(shape) == 1 for shape in tower.values()) else 2  # convolution, norm, ReLU
    convolutions = -1
    for layer, shape in tower.items():
        convolutions += len(shape) == 4
        ours = per_block * convolutions + (len(shape) == 1)
        for theirs, subnet in _TOWERS:
            name = layer.replace(".", r"\.")
            yield rf"head\.{theirs}\.conv\.{name}\.(weight|bias)", rf"head.{subnet}.{ours}.\1"
    yield r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.cls_score.\1"
    yield r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.bbox_pred.\1"
    yield r"head\.regression_head\.bbox_ctrness\.(weight|bias)", r"head.ctrness.\1"


def _add_biases(converted: dict[str, torch.Tensor], num_convs: int) -> None:
    """Zeros for convolutions in front of a norm, which have no bias in RetinaNet's second version."""
    for _, subnet in _TOWERS:
        for index in range(num_convs):
            weight = converted.get(f"head.{subnet}.{3 * index}.weight")
            if weight is not None:
                converted.setdefault(f"head.{subnet}.{3 * index}.bias", weight.new_zeros(len(weight)))


def _two_stage_heads(tensors: Tensors, names: Sequence[str]) -> tuple[Converted, Classes]:
    num_anchors = tensors.shape(r"rpn\.head\.cls_logits\.weight")[0]
    if num_anchors != NUM_RATIOS:
        raise UserError(
            f"{tensors.source} has {num_anchors} anchors a cell; only torchvision's own, of 1 size and {NUM_RATIOS} "
            "ratios, can be converted."
        )
    num_outputs = tensors.shape(r"roi_heads\.box_predictor\.cls_score\.weight")[0]
    classes = kept_classes(num_outputs, names, source=tensors.source, softmax=True)
    num_rpn_convs = len(tensors.names(r"rpn\.head\.conv\.(\d+\.0\.)?weight"))
    convolutions = tensors.names(r"roi_heads\.box_head\.\d+\.0\.weight")
    linear = r"roi_heads\.box_head\.(?:fc\d+|\d+)\.weight"
    fc_dim, fc_inputs = tensors.shape(linear)
    settings = faster_rcnn_settings(
        num_classes=len(classes.outputs),
        num_fc=len(tensors.names(linear)),
        fc_dim=fc_dim,
        resolution=math.isqrt(fc_inputs // tensors.shape(_channels_of_regions(convolutions))[0]),
    )
    settings.update(_ANCHORS)
    settings["MODEL.RPN.POST_NMS_TOPK_TRAIN"] = 2000
    settings["MODEL.RPN.CONV_DIMS"] = [-1] * num_rpn_convs
    settings["MODEL.ROI_BOX_HEAD.POOLER_TYPE"] = "ROIAlign"
    settings["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"] = 2
    if convolutions:
        settings["MODEL.ROI_BOX_HEAD.NUM_CONV"] = len(convolutions)
        settings["MODEL.ROI_BOX_HEAD.CONV_DIM"] = tensors.left[convolutions[0]].shape[0]
        normed = tensors.names(r"roi_heads\.box_head\.\d+\.1\.running_var")
        settings["MODEL.ROI_BOX_HEAD.NORM"] = "BN" if normed else ""
    converted = tensors.take(_two_stage_rules(num_rpn_convs, len(convolutions)))
    # The background is output 0 there and the last one here, and has no boxes here.
    kept = {"cls_score": Classes([*classes.outputs, 0], []), "bbox_pred": classes}
    for name, tensor in converted.items():
        layer = name.split(".")[-2]
        if layer in kept and name.startswith("roi_heads."):
            converted[name] = kept[layer].select(tensor, num_outputs)
    return (converted, settings), classes


def _channels_of_regions(convolutions: Sequence[str]) -> str:
    """Pattern of a convolution with the channels that the first linear layer reads."""
    return convolutions[-1].replace(".", r"\.") if convolutions else r"rpn\.head\.conv\.(0\.0\.)?weight"


def _two_stage_rules(num_rpn_convs: int, num_box_convs: int) -> Iterator[tuple[str, str]]:
    rpn, box_head = "proposal_generator.rpn_head.", "roi_heads.box_head."
    yield r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", rf"{rpn}conv.{'conv0.' if num_rpn_convs > 1 else ''}\1"
    yield r"rpn\.head\.conv\.(\d+)\.0\.(weight|bias)", rf"{rpn}conv.conv\1.\2"
    yield r"rpn\.head\.cls_logits\.(weight|bias)", rf"{rpn}objectness_logits.\1"
    yield r"rpn\.head\.bbox_pred\.(weight|bias)", rf"{rpn}anchor_deltas.\1"
    for index in range(num_box_convs):
        yield rf"roi_heads\.box_head\.{index}\.0\.(weight|bias)", rf"{box_head}conv{index + 1}.\1"
        yield rf"roi_heads\.box_head\.{index}\.1\.(\w+)", rf"{box_head}conv{index + 1}.norm.\1"
    yield r"roi_heads\.box_head\.fc6\.(weight|bias)", rf"{box_head}fc1.\1"
    yield r"roi_heads\.box_head\.fc7\.(weight|bias)", rf"{box_head}fc2.\1"
    # Behind the convolutions there is a flattening layer, and a ReLU behind each linear one.
    for index in range(2):
        yield rf"roi_heads\.box_head\.{num_box_convs + 1 + 2 * index}\.(weight|bias)", rf"{box_head}fc{index + 1}.\1"
    yield r"roi_heads\.box_predictor\.((?:cls_score|bbox_pred)\.(?:weight|bias))", r"roi_heads.box_predictor.\1"

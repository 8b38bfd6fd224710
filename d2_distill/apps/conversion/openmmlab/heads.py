"""Heads: one-stage heads by the names of their last convolutions, and Faster R-CNN's two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ....detectors.anchor_order import to_size_outer
from ....errors import UserError
from .. import Converted, Tensors, faster_rcnn_settings

# Of RetinaNet: sizes 4 * stride * 2^(octave / 3), ratios 1/2, 1, 2.
NUM_SIZES = NUM_RATIOS = 3
_SIZES = [[4 * 2**level * 2 ** (octave / NUM_SIZES) for octave in range(NUM_SIZES)] for level in range(3, 8)]


@dataclass(frozen=True)
class DenseHead:
    """
    Attributes:
        meta_architecture: ours.
        node: of our config, below MODEL.
        predictors: pattern of what its last convolutions' names begin with.
        mark: pattern of a layer by which it is known.
        num_anchors: of a cell.
        settings: of our config, where published models differ from its defaults.
    """

    meta_architecture: str
    node: str
    predictors: str
    mark: str
    num_anchors: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


# The first that fits counts. FCOS's convolutions were once named after it.
DENSE_HEADS = (
    DenseHead(
        "OpenMMLabRetinaNet",
        "RETINANET",
        "retina",
        "retina_cls",
        num_anchors=NUM_SIZES * NUM_RATIOS,
        settings={"MODEL.ANCHOR_GENERATOR.SIZES": _SIZES},
    ),
    DenseHead(
        "OpenMMLabFCOS",
        "FCOS",
        "(?:conv|fcos)",
        "(?:conv|fcos)_centerness",
        settings={"MODEL.FCOS.SCORE_THRESH_TEST": 0.05, "MODEL.FCOS.NMS_THRESH_TEST": 0.5},
    ),
    DenseHead("ATSS", "ATSS", "atss", "atss_cls"),
    DenseHead("GFLv2", "GFL", "gfl", r"reg_conf\.0"),
    DenseHead("GFL", "GFL", "gfl", "gfl_cls"),
)


def find_dense_head(tensors: Tensors) -> DenseHead:
    """
    Raises:
        UserError: there is none that is supported.
    """
    for head in DENSE_HEADS:
        if tensors.names(rf"bbox_head\.{head.mark}\.weight"):
            return head
    raise UserError(
        f"{tensors.source} is of no detector that can be converted; "
        "those are RetinaNet, FCOS, ATSS, GFL, GFLv2 and Faster R-CNN with FPN."
    )


def dense_head(tensors: Tensors) -> Converted:
    """Take the one-stage head ``bbox_head.*``: our tensors ``head.*``, and the config keys that they tell.

    Raises:
        UserError: there is none, or its shapes are not those of the published anchors.
    """
    head = find_dense_head(tensors)
    norm = _tower_norm(tensors)
    settings = _dense_settings(tensors, head, norm)
    converted = tensors.take(_dense_rules(head, settings[f"MODEL.{head.node}.NUM_CONVS"], norm))
    if head.num_anchors > 1:
        for name in converted:
            if name.startswith(("head.cls_score.", "head.bbox_pred.")):
                converted[name] = to_size_outer(converted[name], NUM_SIZES, NUM_RATIOS)
    for index in (0, 2):  # 1x1 convolutions there, linear layers here
        name = f"head.reg_conf.{index}.weight"
        if name in converted:
            converted[name] = converted[name].flatten(start_dim=1)
    tensors.take([(r"bbox_head\.integral\.project", "the constants 0, 1, .. REG_MAX")])
    return converted, settings


def _tower_norm(tensors: Tensors) -> str:
    """Name of the towers' norm; its 32 groups are both sides' default for GroupNorm."""
    for part, name in (("gn", "GN"), ("bn", "BN")):
        if tensors.names(rf"bbox_head\.cls_convs\.0\.{part}\.weight"):
            return name
    return ""


def _dense_rules(head: DenseHead, num_convs: int, norm: str) -> Iterator[tuple[str, str]]:
    per_block = 3 if norm else 2  # convolution, norm, ReLU
    for theirs, ours in (("cls", "cls_subnet"), ("reg", "bbox_subnet")):
        for index in range(num_convs):
            first = per_block * index
            yield rf"bbox_head\.{theirs}_convs\.{index}\.conv\.(\w+)", rf"head.{ours}.{first}.\1"
            yield rf"bbox_head\.{theirs}_convs\.{index}\.(?:gn|bn)\.(\w+)", rf"head.{ours}.{first + 1}.\1"
    for theirs, ours in (("cls", "cls_score"), ("reg", "bbox_pred"), ("centerness", "ctrness")):
        yield rf"bbox_head\.{head.predictors}_{theirs}\.(weight|bias)", rf"head.{ours}.\1"
    yield r"bbox_head\.(scales\.\d+\.scale)", r"head.\1"
    yield r"bbox_head\.(reg_conf\.[02]\.(?:weight|bias))", r"head.\1"


def _dense_settings(tensors: Tensors, head: DenseHead, norm: str) -> dict[str, Any]:
    class_channels = tensors.shape(rf"bbox_head\.{head.predictors}_cls\.weight")[0]
    box_channels = tensors.shape(rf"bbox_head\.{head.predictors}_reg\.weight")[0]
    anchors, node = head.num_anchors, f"MODEL.{head.node}."
    if class_channels % anchors or box_channels % (4 * anchors):
        raise UserError(
            f"{tensors.source} has {class_channels} class and {box_channels} box channels, "
            f"which are not of {anchors} anchors a cell; only the published anchors can be converted."
        )
    # One bin is a plain regression, of deltas or distances.
    reg_max = box_channels // (4 * anchors) - 1
    settings = {
        "MODEL.META_ARCHITECTURE": head.meta_architecture,
        **head.settings,
        node + "NUM_CLASSES": class_channels // anchors,
        node + "NUM_CONVS": len(tensors.names(r"bbox_head\.cls_convs\.\d+\.conv\.weight")),
        node + "NORM": norm,
        node + "REG_MAX": reg_max,
    }
    if head.node == "RETINANET" and reg_max:  # which are only trained as boxes
        settings.update({node + "BBOX_REG_LOSS_TYPE": "giou", node + "BBOX_REG_LOSS_WEIGHT": 2.0})
    if head.node == "FCOS":
        settings[node + "TOWER_BIAS"] = bool(tensors.names(r"bbox_head\.cls_convs\.0\.conv\.bias"))
    if head.meta_architecture == "GFLv2":
        channels, statistics = tensors.shape(r"bbox_head\.reg_conf\.0\.weight")[:2]
        settings[node + "NUM_CLASSES"] -= 1  # the head has one class output more
        settings.update({node + "QUALITY_TOPK": statistics // 4 - 1, node + "QUALITY_CHANNELS": channels})
    return settings


_TWO_STAGE_RULES = (
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(weight|bias)", r"roi_heads.box_head.fc1.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(weight|bias)", r"roi_heads.box_head.fc2.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"roi_heads.box_predictor.bbox_pred.\1"),
)


def is_two_stage(tensors: Tensors) -> bool:
    return bool(tensors.names(r"roi_head\.bbox_head\.fc_cls\.weight"))


def two_stage_heads(tensors: Tensors) -> Converted:
    """Take Faster R-CNN's ``rpn_head.*`` and ``roi_head.*``: our tensors, and the config keys that they tell.

    Orders agree: one anchor size a level, so that of ratios; the background is the last class; FC 1 reads
    (channel, y, x). RoIAlign, levels of RoIs and box scaling are the same, too; only the lower clamp of width
    and height deltas, which Detectron2 lacks, is not.

    Raises:
        UserError: a tensor is missing.
    """
    fc_dim, fc_inputs = tensors.shape(r"roi_head\.bbox_head\.shared_fcs\.0\.weight")
    channels = tensors.shape(r"rpn_head\.rpn_conv\.weight")[1]
    num_classes = tensors.shape(r"roi_head\.bbox_head\.fc_cls\.weight")[0] - 1
    box_outputs = tensors.shape(r"roi_head\.bbox_head\.fc_reg\.weight")[0]
    settings = {
        **faster_rcnn_settings(
            num_classes=num_classes,
            num_fc=len(tensors.names(r"roi_head\.bbox_head\.shared_fcs\.\d+\.weight")),
            fc_dim=fc_dim,
            resolution=math.isqrt(fc_inputs // channels),
        ),
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": box_outputs == 4 != 4 * num_classes,
    }
    return tensors.take(_TWO_STAGE_RULES), settings

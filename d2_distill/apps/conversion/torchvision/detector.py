"""Puts the parts together: all tensors by our names, and the config of the model that they fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....errors import UserError
from .. import TORCHVISION_STYLE, Conversion, Converted, Tensors, merged, pyramid, resnet
from .heads import heads

_BODY = r"backbone\.body\."
# Of Detectron2's FrozenBatchNorm2d, and of torchvision's unless COCO weights were loaded.
EPS = 1e-5
# A tensor of a model that cannot be converted -> what the model is, and what to do.
_OTHERS = (
    (r"roi_heads\.mask_.*", "a Mask R-CNN", "only detectors of boxes can be converted"),
    (r"roi_heads\.keypoint_.*", "a Keypoint R-CNN", "only detectors of boxes can be converted"),
    (r"backbone\.body\.\d+\..*", "a detector on MobileNet", "only ResNets can be converted"),
    (r"head\.classification_head\.module_list\..*", "an SSD", "only RetinaNet, FCOS and Faster R-CNN can be converted"),
    (r"bbox_head\..*|roi_head\..*", "a detector of OpenMMLab", "convert it with tools/convert_openmmlab.py"),
    (
        r"fc\.weight|classifier\..*|head\.weight|heads\..*",
        "a classifier",
        "tools/convert_torchvision_backbone.py makes a backbone of it",
    ),
)


def convert_torchvision(
    state_dict: dict[str, torch.Tensor],
    *,
    classes: Sequence[str] = (),
    frozen_bn_eps: float | None = None,
    opts: Sequence[str] = (),
    source: str = "The checkpoint",
) -> Conversion:
    """
    Args:
        state_dict: of RetinaNet, FCOS or Faster R-CNN of torchvision, with a ResNet and FPN.
        classes: names of the classes, in the order of the labels; not needed with COCO's.
        frozen_bn_eps: ``eps`` of the frozen batch norms, which no tensor tells: 0 in RetinaNet and Faster R-CNN that
            were loaded with COCO_V1 weights, 1e-5 else. None: 0 if the outputs are those of COCO_V1, 1e-5 in FCOS.
        opts: flat list of config keys and values, which override all else.
        source: what error messages call the checkpoint.

    Raises:
        UserError: the state dict is of something else, or has tensors that are not known, or lacks some that tell a
            shape, or leaves ``frozen_bn_eps`` open, or ``classes`` or ``opts`` do not fit.
    """
    tensors = Tensors(state_dict, source)
    _require_known(tensors)
    found, kept = heads(tensors, classes)
    meta_architecture = found[1]["MODEL.META_ARCHITECTURE"]
    two_stage = meta_architecture == "GeneralizedRCNN"
    eps = None
    if not tensors.names(_BODY + r"bn1\.num_batches_tracked"):
        eps = EPS if meta_architecture == "TorchvisionFCOS" else 0.0 if kept.published else None
        eps = eps if frozen_bn_eps is None else frozen_bn_eps
        if eps is None:
            raise UserError(
                f"{source} does not tell the eps of its frozen batch norms; give --frozen-bn-eps 0 if training started "
                f"from torchvision's COCO weights (weights=...COCO_V1 or DEFAULT), else --frozen-bn-eps {EPS}."
            )
    elif frozen_bn_eps is not None:
        raise UserError(f"{source} has no frozen batch norms; leave out --frozen-bn-eps.")
    parts = [found, _body(tensors, two_stage, eps), _fpn(tensors, two_stage)]
    tensors.require_none_left()
    state_dict, settings = merged(parts)
    if kept.names:
        settings["DATASETS.CLASSES"] = kept.names
    return Conversion.of((state_dict, settings), opts=opts, source=source)


def _require_known(tensors: Tensors) -> None:
    for pattern, model, remedy in _OTHERS:
        if tensors.names(pattern):
            raise UserError(f"{tensors.source} is the checkpoint of {model}; {remedy}.")


def _body(tensors: Tensors, two_stage: bool, eps: float | None) -> Converted:
    """Take the ResNet; frozen batch norms of another ``eps`` than ours get weights that make up for it.

    Args:
        eps: of the frozen batch norms; None if its batch norms are not frozen.
    """
    converted, settings = resnet(tensors, two_stage=two_stage, prefix=_BODY)
    settings.update({**TORCHVISION_STYLE, "MODEL.RESNETS.NORM": "BN" if eps is None else "FrozenBN"})
    if eps is not None and eps != EPS:
        for name in [name for name in converted if name.endswith(".norm.running_var")]:
            weight = name.replace("running_var", "weight")
            variance = converted[name].double()
            factor = ((variance + EPS) / (variance + eps)).sqrt()
            converted[weight] = (converted[weight].double() * factor).to(converted[weight].dtype)
    return converted, settings


def _fpn(tensors: Tensors, two_stage: bool) -> Converted:
    """Take the pyramid, of both versions of torchvision's modules, with norms or without."""
    inner, layer = (rf"backbone\.fpn\.{blocks}\.{{}}" for blocks in ("inner_blocks", "layer_blocks"))
    normed = bool(tensors.names(inner.format(0) + r"\.1\.running_var"))
    norms = []
    for index in range(4 if two_stage else 3):
        for blocks, ours in ((inner, "lateral"), (layer, "output")):
            level = index + (2 if two_stage else 3)
            norms.append((blocks.format(index) + r"\.1\.(\w+)", rf"backbone.fpn_{ours}{level}.norm.\1"))
    converted = tensors.take(norms)
    convolutions, settings = pyramid(
        tensors,
        two_stage=two_stage,
        lateral=inner + r"(?:\.0)?",
        output=layer + r"(?:\.0)?",
        top=(r"backbone\.fpn\.extra_blocks\.p6", r"backbone\.fpn\.extra_blocks\.p7"),
    )
    settings["MODEL.FPN.NORM"] = "BN" if normed else ""
    if not two_stage:
        settings["MODEL.FPN.TOP_BLOCK_RELU"] = True
    return {**converted, **convolutions}, settings

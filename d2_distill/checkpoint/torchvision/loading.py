"""Fills the backbone of a detector with a classifier of torchvision or timm, completely or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from detectron2.modeling.backbone import Backbone, ResNet
from torch import nn

from ...backbones.slimmable import Slimmable
from ...backbones.swin import Detectron2Swin
from ...backbones.timm_trunk import TimmTrunk
from ...backbones.torchvision_trunk import TorchvisionTrunk
from ...errors import UserError
from ..timm_hub import PREFIX as TIMM_PREFIX
from ..timm_hub import TimmWeights, is_timm_address
from .address import PREFIX, TorchvisionWeights
from .layouts import COUNTER, FIRST_CONVOLUTIONS, RULES, marked_rules, renamed, shapes_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = dict[str, torch.Tensor]

# What a classifier fills: neither LayerNorms on a Swin Transformer's outputs nor offsets of deformable convolutions.
_OF_CLASSIFIER = re.compile(r"(stem|res[2-5]|features|body)\.(?!.*\bconv2?_offset\.).+")
# What builds the network of each model of torchvision.
_RESNET = "MODEL.RESNETS.DEPTH {} with STEM_OUT_CHANNELS 64 and RES2_OUT_CHANNELS {}"
_BUILT_BY = {
    **{f"resnet{depth}": _RESNET.format(depth, 64 if depth < 50 else 256) for depth in (18, 34, 50, 101, 152)},
    "resnext50_32x4d": "MODEL.RESNETS.DEPTH 50, NUM_GROUPS 32 and WIDTH_PER_GROUP 4",
    "resnext101_32x8d": "MODEL.RESNETS.DEPTH 101, NUM_GROUPS 32 and WIDTH_PER_GROUP 8",
    "resnext101_64x4d": "MODEL.RESNETS.DEPTH 101, NUM_GROUPS 64 and WIDTH_PER_GROUP 4",
    "wide_resnet50_2": "MODEL.RESNETS.DEPTH 50 and WIDTH_PER_GROUP 128",
    "wide_resnet101_2": "MODEL.RESNETS.DEPTH 101 and WIDTH_PER_GROUP 128",
    "mobilenet_v2": "MODEL.BACKBONE.NAME build_mobilenet_v2_fpn_backbone with MODEL.MOBILENETV2.WIDTH_MULT 1.0",
    "swin_t": "MODEL.BACKBONE.NAME build_swin_fpn_backbone",
    "swin_s": "MODEL.BACKBONE.NAME build_swin_fpn_backbone with MODEL.SWIN.DEPTHS [2, 2, 18, 2]",
    "swin_b": "MODEL.BACKBONE.NAME build_swin_fpn_backbone with MODEL.SWIN.DEPTHS [2, 2, 18, 2], EMBED_DIM 128 and "
    "NUM_HEADS [4, 8, 16, 32]",
}


def check_pretrained(model: nn.Module, address: str) -> None:
    """Check that :func:`load_pretrained` can fill a detector; the file is downloaded if torch does not have it yet.

    Raises:
        UserError: the weights fit another backbone (known without the file), or there is no file, or a damaged one.
    """
    require_fitting(model, address)
    _fitted(model, weights_of(address))


def require_fitting(model: nn.Module, address: str) -> None:
    """Check that a backbone has the names and shapes of the classifier; the file is not read.

    Raises:
        UserError: it has not.
    """
    weights = weights_of(address)
    trunk = _timm_trunk(model)
    # Networks of equal shapes may differ in their padding or activation.
    if trunk is not None and isinstance(weights, TimmWeights) and trunk.architecture == weights.model:
        return
    if trunk is not None:
        raise UserError(
            f"MODEL.WEIGHTS: {weights} does not fit the backbone, timm's {trunk.architecture}; use "
            f"{TIMM_PREFIX}{trunk.architecture}"
            + (f", or set MODEL.TIMM.NAME to {weights.model}." if isinstance(weights, TimmWeights) else ".")
        )
    _require_complete(model, _converted(weights.shapes(), model, weights), str(weights), weights)


def load_pretrained(model: nn.Module, address: str, *, input_format: str) -> None:
    """Load the weights of ``torchvision://...`` or ``timm://...`` into the backbone of a detector; all else stays.

    Args:
        input_format: channel order of the detector's images. The classifiers' is "RGB"; for "BGR" the inputs of the
            first convolution are exchanged, which computes the same.

    Raises:
        UserError: see :func:`check_pretrained`.
    """
    require_fitting(model, address)
    weights = weights_of(address)
    state = _fitted(model, weights)
    flipped = input_format == "BGR"
    first = FIRST_CONVOLUTIONS
    trunk = _timm_trunk(model)
    if trunk is not None:
        first = tuple(trunk.image_convolutions())
        if flipped and not first:
            raise UserError(
                f"INPUT.FORMAT is BGR, but {weights} was trained with RGB, and no convolution of it reads the image; "
                "set INPUT.FORMAT to RGB."
            )
    for name in state:
        if flipped and name.endswith(first):
            state[name] = state[name].flip(1)
    model.load_state_dict(state, strict=False)
    logger.info(
        "ImageNet weights of %s: %d tensors of the backbone%s; FPN and head start fresh%s.",
        weights, len(state), ", for images in the order BGR" if flipped else "", _also_fresh(model),
    )


def fit_classifier(state: State, model: nn.Module, source: str) -> State:
    """Return a state dict for ``model``: of a classifier in torchvision's or timm's names its backbone, else all.

    How the images were normalized, and in which order of channels, is not known.

    Args:
        source: the file, for messages.

    Raises:
        UserError: it is such a classifier, but does not fill the backbone.
    """
    trunk = _timm_trunk(model)
    if trunk is not None:
        state = state["state_dict"] if isinstance(state.get("state_dict"), Mapping) else state  # of timm's training
        converted = trunk.from_classifier(state)
    else:
        rules = marked_rules(state)
        converted = renamed(state, rules) if rules is not None else {}
    if not converted:
        return state
    _require_complete(model, {name: value.shape for name, value in converted.items()}, source)
    fitted = _with_prefixes(model, converted)
    logger.info(
        "%s: %d tensors of a classifier in %s names fill the backbone; FPN and head start fresh%s. "
        "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be those it was trained with.",
        source, len(fitted), "torchvision's" if trunk is None else "timm's", _also_fresh(model),
    )
    return fitted


def is_address(weights: str) -> bool:
    """Whether these are a classifier's weights by name."""
    return weights.startswith((PREFIX, TIMM_PREFIX))


def weights_of(address: str) -> TorchvisionWeights | TimmWeights:
    """
    Raises:
        UserError: there are no such weights.
    """
    return (TimmWeights if is_timm_address(address) else TorchvisionWeights).of(address)


def _converted(tensors: Mapping[str, T], model: nn.Module, weights: TorchvisionWeights | TimmWeights) -> dict[str, T]:
    """Return what the backbone needs of a classifier's tensors, by the backbone's names."""
    trunk = _timm_trunk(model)
    if trunk is not None:
        return trunk.from_classifier(tensors)
    if isinstance(weights, TorchvisionWeights):
        return renamed(tensors, RULES[weights.model])
    rules = marked_rules(tensors)  # timm's ResNets have torchvision's names
    return renamed(tensors, rules) if rules is not None else {}


def _timm_trunk(model: nn.Module) -> TimmTrunk | None:
    return next((module for module in model.modules() if isinstance(module, TimmTrunk)), None)


def _fitted(model: nn.Module, weights: TorchvisionWeights | TimmWeights) -> State:
    converted = _converted(weights.read(), model, weights)
    shapes = {name: value.shape for name, value in converted.items()}
    _require_complete(model, shapes, weights.path, weights)
    return _with_prefixes(model, converted)


def _trunks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the prefix and the module of what starts from a classifier: the backbone; RoI heads that hold its res5."""
    for name, module in model.named_modules():
        res5 = getattr(module, "res5", None)
        if isinstance(module, (ResNet, TorchvisionTrunk, TimmTrunk)) or isinstance(res5, nn.Sequential):
            yield f"{name}.", module


def _wanted(trunk: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that a classifier has to fill."""
    return {
        name: value.shape
        for name, value in trunk.state_dict().items()
        if _OF_CLASSIFIER.fullmatch(name) and not name.endswith(COUNTER)
    }


def _with_prefixes(model: nn.Module, converted: State) -> State:
    """Return the tensors by the names of the whole detector."""
    return {prefix + name: converted[name] for prefix, trunk in _trunks(model) for name in _wanted(trunk)}


def _also_fresh(model: nn.Module) -> str:
    backbones = [trunk for _, trunk in _trunks(model) if isinstance(trunk, Backbone)]
    names = [name for backbone in backbones for name in backbone.state_dict() if not _OF_CLASSIFIER.fullmatch(name)]
    return f", as do {len(names)} tensors of the backbone that no classifier has, such as {names[0]}" if names else ""


def _require_complete(
    model: nn.Module,
    found: Mapping[str, torch.Size],
    source: str,
    weights: TorchvisionWeights | TimmWeights | None = None,
) -> None:
    """
    Args:
        found: shapes of the classifier's tensors, by the backbone's names.
        weights: what they are, if it is known.

    Raises:
        UserError: a tensor of the backbone is missing or has another shape, or the classifier is deeper, or the
            detector has no such backbone.
    """
    trunks = list(_trunks(model))
    if not trunks:
        own = any(isinstance(module, Detectron2Swin) for module in model.modules())
        remedy = (
            "set MODEL.SWIN.IMPLEMENTATION to torchvision" if own else
            "set MODEL.BACKBONE.NAME to a builder of a ResNet, MobileNetV2 or Swin Transformer"
        )
        raise UserError(f"MODEL.WEIGHTS: {source} cannot fill the backbone of {type(model).__name__}; {remedy}.")
    for _, trunk in trunks:
        lacking, surplus = list(_lacking(trunk, found)), list(_surplus(trunk, found))
        if surplus and not lacking:
            raise UserError(
                f"MODEL.WEIGHTS: {source} does not fit the backbone, a {type(trunk).__name__}: it has {len(surplus)} "
                f"tensors more in its stages ({surplus[0]}, ...); {_remedy(trunk, weights)}."
            )
        if lacking:
            names = ", ".join([*lacking[:3], *["..."] * (len(lacking) > 3)])
            raise UserError(
                f"MODEL.WEIGHTS: {source} does not fit the backbone, a {type(trunk).__name__}: {len(lacking)} of its "
                f"{len(_wanted(trunk))} tensors are missing or have another shape ({names}); "
                f"{_remedy(trunk, weights)}."
            )


def _lacking(trunk: nn.Module, found: Mapping[str, torch.Size]) -> Iterator[str]:
    """Yield what a classifier does not fill, with the shapes if it has the name."""
    for name, shape in _wanted(trunk).items():
        if name not in found:
            yield name
        elif found[name] != shape:
            yield f"{name} {tuple(found[name])} (backbone: {tuple(shape)})"


def _surplus(trunk: nn.Module, found: Mapping[str, torch.Size]) -> Iterator[str]:
    """Yield what a classifier has beyond a trunk's tensors in the stages of the trunk, as deeper networks do."""
    wanted = _wanted(trunk)
    stages = {_stage(name) for name in wanted}
    for name in found:
        if name not in wanted and not name.endswith(COUNTER) and (_stage(name) in stages or name.startswith("body.")):
            yield name


def _stage(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "features" else 1])


def _remedy(trunk: nn.Module, weights: TorchvisionWeights | TimmWeights | None) -> str:
    """Return what to change: the weights, or the network."""
    if isinstance(trunk, TimmTrunk):
        return f"use {TIMM_PREFIX}{trunk.architecture}"
    layouts = {model: renamed(shapes_of(model), rules) for model, rules in RULES.items()}
    fitting = [
        model
        for model, shapes in layouts.items()
        if not any(_lacking(trunk, shapes)) and not any(_surplus(trunk, shapes))
    ]
    if fitting:
        remedies = [f"use {PREFIX}{fitting[0]}"]
    elif isinstance(trunk, Slimmable):
        remedies = ["use the published weights of the slimmable network"]
    else:
        remedies = ['set MODEL.WEIGHTS to ""']  # a width of its own: torchvision has no weights of it
    if isinstance(weights, TimmWeights):
        remedies.append(f"build the network of {weights.model}{_of_timm(weights)}")
    elif weights is not None:
        keys = _BUILT_BY[weights.model]
        if isinstance(trunk, Slimmable):
            keys = f"{keys}, or at its full width, MODEL.SLIMMABLE.WIDTH_MULT 1.0"
        if keys.startswith("MODEL.RESNETS") and not isinstance(trunk, ResNet):
            keys = f"MODEL.BACKBONE.NAME of a ResNet's builder, {keys}"
        remedies.append(f"build the network of {weights.model} ({keys})")
    return ", or ".join(remedies)


def _of_timm(weights: TorchvisionWeights | TimmWeights) -> str:
    """Return how to build the network of timm's weights; "" for torchvision's."""
    if isinstance(weights, TorchvisionWeights):
        return ""
    return f" (MODEL.BACKBONE.NAME build_timm_fpn_backbone with MODEL.TIMM.NAME {weights.model})"

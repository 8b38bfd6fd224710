"""How torchvision names the tensors of its classifiers, and how Detectron2 and this project name them in a backbone."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torchvision

from ...errors import UserError

T = TypeVar("T")
# Pairs (pattern, new name as for ``re.sub``); a pattern fits whole names.
Rules = Iterable[tuple[str, str]]

# Batch norms' counters, which older checkpoints and frozen batch norms lack.
COUNTER = "num_batches_tracked"


def resnet_rules(prefix: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yield the rules of a ResNet: torchvision's names after the pattern ``prefix``, Detectron2's after ``ours``."""
    yield prefix + r"conv1\.weight", ours + "stem.conv1.weight"
    yield prefix + r"bn1\.(\w+)", ours + r"stem.conv1.norm.\1"
    for stage in range(1, 5):
        block, our_block = rf"{prefix}layer{stage}\.(\d+)\.", rf"{ours}res{stage + 1}.\1."
        yield block + r"conv(\d)\.weight", our_block + r"conv\2.weight"
        yield block + r"bn(\d)\.(\w+)", our_block + r"conv\2.norm.\3"
        yield block + r"conv2\.conv_offset\.(\w+)", our_block + r"conv2_offset.\2"
        yield block + r"downsample\.0\.weight", our_block + "shortcut.weight"
        yield block + r"downsample\.1\.(\w+)", our_block + r"shortcut.norm.\2"


_RESNET = tuple(resnet_rules("", ""))
_SAME_NAMES = ((r"(features\..+)", r"\1"),)
# Models of torchvision that a backbone can start from -> from their names to the backbone's.
RULES: dict[str, Rules] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "resnet152": _RESNET,
    "resnext50_32x4d": _RESNET,
    "resnext101_32x8d": _RESNET,
    "resnext101_64x4d": _RESNET,
    "wide_resnet50_2": _RESNET,
    "wide_resnet101_2": _RESNET,
    "mobilenet_v2": _SAME_NAMES,
    "swin_t": _SAME_NAMES,
    "swin_s": _SAME_NAMES,
    "swin_b": _SAME_NAMES,
}
# Of the others the names are equal to those of one of these; only shapes differ.
_OF_OWN_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2", "swin_t", "swin_s")
# Names by which a state dict of such a classifier, with or without its last layer, is known.
_MARKS = {
    ("conv1.weight", "layer1.0.conv1.weight"): _RESNET,
    ("features.0.0.weight", "features.1.conv.0.0.weight"): _SAME_NAMES,
    ("features.0.0.weight", "features.1.0.attn.qkv.weight"): _SAME_NAMES,
}
# Where the first convolution is, by the backbones' names.
FIRST_CONVOLUTIONS = ("stem.conv1.weight", "features.0.0.weight")


def renamed(state: Mapping[str, T], rules: Rules) -> dict[str, T]:
    """Return what fits a rule, by the backbone's names; the classifier's last layers are left out."""
    found = {}
    for pattern, template in rules:
        for name, value in state.items():
            match = re.fullmatch(pattern, name)
            if match:
                found[match.expand(template)] = value
    return found


@functools.lru_cache(maxsize=None)
def shapes_of(model: str) -> Mapping[str, torch.Size]:
    """Return the shapes of the tensors of a torchvision model, by torchvision's names; nothing is allocated."""
    with torch.device("meta"):
        state = torchvision.models.get_model(model, weights=None).state_dict()
    return {name: value.shape for name, value in state.items()}


def marked_rules(names: Iterable[str]) -> Rules | None:
    """Return the rules of the classifier whose names these seem to be; None if they are of something else."""
    names = set(names)
    return next((rules for marks, rules in _MARKS.items() if names.issuperset(marks)), None)


def identified_rules(names: Iterable[str], source: str) -> Rules:
    """Return the rules of the architecture whose names these are exactly.

    Raises:
        UserError: there is none; the message names ``source``, and what differs from the most similar one.
    """
    names = _required(names)
    theirs = {model: _required(shapes_of(model)) for model in _OF_OWN_NAMES}
    model = min(theirs, key=lambda model: len(theirs[model] ^ names))
    differences = {"lacks": theirs[model] - names, "has the unknown": names - theirs[model]}
    found = [f"{what} {', '.join(sorted(which)[:3])}" for what, which in differences.items() if which]
    if found:
        raise UserError(
            f"{source} does not hold a torchvision ResNet, MobileNetV2 or Swin Transformer: compared with the most "
            f"similar, {model}, it {' and '.join(found)}."
        )
    return RULES[model]


def _required(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if not name.endswith(COUNTER))

"""Matches checkpoint names to model names, and renames Caffe2 checkpoints."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch

# Applied in this order to a Caffe2 name after its "_" became ".".
_RENAMES = [(re.compile(pattern), new) for pattern, new in (
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    # batch norms
    (r"\.bn\.(s|gamma)$", ".norm.weight"),
    (r"\.bn\.(bias|beta)$", ".norm.bias"),
    (r"\.bn\.rm$", ".norm.running_mean"),
    (r"\.bn\.riv$", ".norm.running_var"),
    # ResNet
    (r"^(res\.)?conv1\.", "stem.conv1."),
    (r"^pred\.", "linear."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2a\.", ".conv1."),
    (r"\.branch2b\.", ".conv2."),
    (r"\.branch2c\.", ".conv3."),
    # FPN
    (r"^fpn\.inner\.res(\d)\.\d+\.sum\.(lateral\.)?", r"fpn_lateral\1."),
    (r"^fpn\.res(\d)\.\d+\.sum\.", r"fpn_output\1."),
    # RPN
    (r"^conv\.rpn\.(fpn2\.)?", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.bbox\.pred\.(fpn2\.)?", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^rpn\.cls\.logits\.(fpn2\.)?", "proposal_generator.rpn_head.objectness_logits."),
    # box head
    (r"^bbox\.pred\.", "bbox_pred."),
    (r"^cls\.score\.", "cls_score."),
    (r"^fc6\.", "box_head.fc1."),
    (r"^fc7\.", "box_head.fc2."),
    (r"^head\.conv(\d)\.", r"box_head.conv\1."),
)]


def _convert_c2(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the entries, and move the background class, which Caffe2 has first, to the end."""
    converted = {}
    for name, value in state_dict.items():
        name = name.replace("_", ".")
        for pattern, new in _RENAMES:
            name = pattern.sub(new, name)
        if name.startswith("bbox_pred."):
            value = value[4:]  # the background has no boxes here
        elif name.startswith("cls_score."):
            value = torch.cat([value[1:], value[:1]])
        converted[name] = value
    return converted


def _longest_suffix(name: str, candidates: Iterable[str]) -> str | None:
    """The longest of the candidates that equals ``name`` or its end after a dot."""
    parts = name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in candidates), None)


def align_and_update_state_dicts(
    model_state_dict: dict[str, torch.Tensor], ckpt_state_dict: dict[str, torch.Tensor],
    c2_conversion: bool = True,
) -> dict[str, torch.Tensor]:
    """Give checkpoint entries the names that they have in the model.

    An entry matches a model name that equals its own, or ends with "." and its own; the longest such wins.
    One of another shape is skipped with a warning. Entries without a match keep the checkpoint's names.

    Args:
        c2_conversion: rename a Caffe2 checkpoint first.

    Raises:
        ValueError: one entry matches two model names.
    """
    logger = logging.getLogger(__name__)
    if c2_conversion:
        ckpt_state_dict = _convert_c2(ckpt_state_dict)

    model_names: dict[str, str] = {}  # checkpoint name -> model name
    for model_name in sorted(model_state_dict):
        name = _longest_suffix(model_name, ckpt_state_dict)
        if name is None:
            continue
        shape, model_shape = tuple(ckpt_state_dict[name].shape), tuple(model_state_dict[model_name].shape)
        if shape != model_shape:
            logger.warning(f"{name} of the checkpoint has the shape {shape}, but {model_name} of the model "
                           f"{model_shape}: it will not be loaded.")
            continue
        if name in model_names:
            raise ValueError(f"{name} of the checkpoint fits two places of the model, "
                             f"{model_names[name]} and {model_name}; load one of these parts alone.")
        model_names[name] = model_name

    if model_names:
        logger.info(f"Matched {len(model_names)} of the model's {len(model_state_dict)} names.")
    else:
        logger.warning("The checkpoint and the model have no names in common: nothing will be loaded.")
    return {model_names.get(name, name): value for name, value in ckpt_state_dict.items()}

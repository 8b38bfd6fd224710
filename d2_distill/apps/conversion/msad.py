"""Checkpoints of the published MSAD code as checkpoints of the project's models."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from ...backbones import LowResolution
from ...backbones.slimmable import Slimmable
from ...checkpoint.slimmable import of_one_width
from ...detectors import MultiScaleDetector
from ...errors import UserError

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MSADConversion:
    """
    Attributes:
        state_dict: by our names.
        dropped: what the file has and the model does without: batch norms of other widths and, of a student's
            file, the teacher, whose statistics training has changed, and P7 of the small image.
    """

    state_dict: State
    dropped: list[str]


def convert_msad(state: State, model: nn.Module, source: str) -> MSADConversion:
    """
    Args:
        state: of a published teacher (``T_backbone``, ``SE``, ``T_fcos_head``) or student, which holds its
            teacher, too (``S_backbone``, ``S_fcos_head``).
        model: the :class:`MultiScaleDetector` or low-resolution FCOS that it is for.
        source: what error messages call the checkpoint.

    Raises:
        UserError: it is for another model.
    """
    left = dict(state)

    def take(prefix: str) -> State:
        """Tensors whose names begin so, without it."""
        return {name[len(prefix) :]: left.pop(name) for name in list(left) if name.startswith(prefix)}

    of_student = any(name.startswith("S_") for name in state)
    _require_role(model, of_student, source)
    parts: dict[str, State] = {}
    if of_student:
        letter, inner, pyramid, pyramid_name = "S", "", model.backbone.pyramid, "backbone.pyramid."
        unused = ("T_backbone.", "SE.", "T_fcos_head.", "S_backbone.top_block.p7.")
        dropped = [prefix + name for prefix in unused for name in take(prefix)]
    else:
        letter, inner, pyramid, pyramid_name = "T", "detector.", model.backbone, "detector.backbone."
        parts["fusion."], dropped = take("SE."), []

    bottom_up_name = f"{letter}_backbone.bottom_up."
    bottom_up = take(bottom_up_name)
    if isinstance(pyramid.bottom_up, Slimmable):
        others = [name for name in bottom_up if _is_of_other_width(name, pyramid.bottom_up.width_index)]
        dropped += [bottom_up_name + name for name in others]
        of_width = len(bottom_up) - len(others)
        bottom_up = of_one_width(bottom_up, pyramid.bottom_up)
        if len(bottom_up) != of_width:
            raise UserError(
                f"{source}: only {len(bottom_up)} of the {of_width} tensors of its backbone fit that of the "
                "config; name the config of this checkpoint, with its DEPTH, WIDTH_MULT and WIDTH_MULT_LIST "
                "of MODEL.SLIMMABLE."
            )
    parts[f"{pyramid_name}bottom_up."] = bottom_up
    parts[pyramid_name] = take(f"{letter}_backbone.")
    parts[f"{inner}head."] = head_names(take(f"{letter}_fcos_head."))
    if left:
        raise UserError(
            f"{source} has {len(left)} tensors that no model of MSAD has ({', '.join(sorted(left))}); remove "
            "them if the detector works without."
        )
    converted = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    return MSADConversion(converted, dropped)


def _require_role(model: nn.Module, of_student: bool, source: str) -> None:
    if of_student and not isinstance(model.backbone, LowResolution):
        raise UserError(
            f"{source} is of a student, but the config is not; name one with MODEL.BACKBONE.NAME "
            "build_low_resolution_backbone. (The teacher in it is of no use: its batch statistics have drifted.)"
        )
    if not of_student and not isinstance(model, MultiScaleDetector):
        raise UserError(
            f"{source} is of a teacher, but the config is not; name one with MODEL.META_ARCHITECTURE "
            "MultiScaleDetector."
        )


def _is_of_other_width(name: str, width_index: int) -> bool:
    number = re.search(r"\.bn\.(\d+)\.", name)
    return number is not None and int(number[1]) != width_index


def head_names(state: State) -> State:
    """The published FCOS head, without its prefix, by the names and shapes of our ``TowerHead``."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(cls|bbox)_tower\.", r"\1_subnet.", name)
        name = re.sub(r"^cls_logits\.", "cls_score.", name)
        # Factors of levels are scalars here and vectors of one there.
        renamed[name] = value.reshape(()) if name.startswith("scales.") else value
    return renamed

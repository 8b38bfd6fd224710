"""Puts the parts together: all tensors by our names, and the config of the model that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....errors import UserError
from .. import Conversion, Tensors, merged
from .backbones import is_res2net, is_swin, pyramid, res2net, resnet, swin
from .heads import dense_head, is_two_stage, two_stage_heads
from .reading import Checkpoint
from .training_config import STYLES, fcos_settings_of_text, settings_of_text


def convert_openmmlab(
    checkpoint: Checkpoint,
    *,
    style: str | None = None,
    opts: Sequence[str] = (),
    source: str = "The checkpoint",
) -> Conversion:
    """
    Args:
        checkpoint: of RetinaNet, FCOS, ATSS, GFL, GFLv2 or Faster R-CNN, with ResNet, Res2Net or Swin and FPN.
        style: key of STYLES, which overrides the text of the checkpoint's config.
        opts: flat list of config keys and values, which override all else.
        source: what error messages call the checkpoint.

    Raises:
        UserError: it has tensors that are not known, lacks some that tell a shape, or does not tell a key
            that neither ``style`` nor ``opts`` give, or ``opts`` do not fit the config.
    """
    tensors = Tensors(checkpoint.state_dict, source)
    two_stage = is_two_stage(tensors)
    backbone = swin if is_swin(tensors) else res2net if is_res2net(tensors) else resnet
    parts = [
        two_stage_heads(tensors) if two_stage else dense_head(tensors),
        backbone(tensors, two_stage=two_stage),
        pyramid(tensors, two_stage=two_stage),
    ]
    tensors.require_none_left()
    state_dict, settings = merged(parts)
    settings.update(_training_settings(checkpoint.config_text, style, settings))
    number = next(value for key, value in settings.items() if key.endswith(".NUM_CLASSES"))
    if number == len(set(checkpoint.class_names)) == len(checkpoint.class_names):
        settings["DATASETS.CLASSES"] = checkpoint.class_names
    undecided = [key for key in _required(settings) if key not in (*settings, *opts[::2])]
    if undecided:
        raise UserError(
            f"{source} does not tell {', '.join(undecided)}; append them to the command as KEY VALUE, "
            "those of pixels and strides also by --style."
        )
    return Conversion.of((state_dict, settings), opts=opts, source=source)


def _training_settings(text: str, style: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What only the training config tells, as far as it and ``style`` do; otherwise as published, or not."""
    fcos = settings["MODEL.META_ARCHITECTURE"] == "OpenMMLabFCOS"
    found = {"MODEL.FPN.TOP_BLOCK_RELU": fcos, **settings_of_text(text)}
    if fcos:
        found.update(fcos_settings_of_text(text))
    found.update(STYLES[style] if style else {})
    if settings["MODEL.FPN.TOP_BLOCK"] == "MaxPool":
        del found["MODEL.FPN.TOP_BLOCK_RELU"]
    if "MODEL.RESNETS.DEPTH" not in settings:
        found.pop("MODEL.RESNETS.STRIDE_IN_1X1", None)
        return found
    caffe = found.get("MODEL.RESNETS.STRIDE_IN_1X1", False)
    return {
        **found,
        "MODEL.RESNETS.NORM": "FrozenBN" if caffe else "BN",
        "MODEL.BACKBONE.FIXED_BN_STATISTICS": not caffe,
    }


def _required(settings: dict[str, Any]) -> list[str]:
    keys = ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"]
    if "MODEL.RESNETS.DEPTH" in settings:
        keys.append("MODEL.RESNETS.STRIDE_IN_1X1")
    if "MODEL.RESNETS.DEFORM_ON_PER_STAGE" in settings:
        keys += ["MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS"]
    if settings["MODEL.META_ARCHITECTURE"] == "OpenMMLabFCOS":
        keys += ["MODEL.FCOS.CENTERNESS_ON", "MODEL.FCOS.CENTER_SAMPLING_RADIUS"]
        if not settings["MODEL.FCOS.REG_MAX"]:
            keys.append("MODEL.FCOS.DISTANCES")
    return keys

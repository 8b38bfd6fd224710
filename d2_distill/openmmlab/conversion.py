"""Puts the parts together: all tensors by our names, and the config of the model that they fill."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import torch
import yaml
from detectron2.config import CfgNode

from ..config import read_config
from ..errors import UserError
from .backbones import is_swin, pyramid, resnet, swin
from .heads import dense_head, is_two_stage, two_stage_heads
from .reading import Checkpoint
from .tensors import Tensors
from .training_config import STYLES, fcos_settings_of_text, settings_of_text


@dataclass(frozen=True)
class Conversion:
    """
    Attributes:
        state_dict: by our names.
        cfg: config of the detector.
        keys: of the config that were set.
    """

    state_dict: Dict[str, torch.Tensor]
    cfg: CfgNode
    keys: List[str]

    def yaml(self, **more: Any) -> str:
        """The keys as a config file, with further keys below MODEL."""
        tree: Dict[str, Any] = {"VERSION": 2, "MODEL": more}
        for key in self.keys:
            *path, last = key.split(".")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
            node[last] = functools.reduce(getattr, key.split("."), self.cfg)
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def convert(
    checkpoint: Checkpoint,
    *,
    style: Optional[str] = None,
    opts: Sequence[str] = (),
    source: str = "The checkpoint",
) -> Conversion:
    """
    Args:
        checkpoint: of RetinaNet, FCOS, ATSS, GFL, GFLv2 or Faster R-CNN, with ResNet or Swin and FPN.
        style: key of STYLES, which overrides the text of the checkpoint's config.
        opts: flat list of config keys and values, which override all else.
        source: what error messages call the checkpoint.

    Raises:
        UserError: it has tensors that are not known, lacks some that tell a shape, or does not tell a key
            that neither ``style`` nor ``opts`` give, or ``opts`` do not fit the config.
    """
    tensors = Tensors(checkpoint.state_dict, source)
    two_stage = is_two_stage(tensors)
    parts = [
        two_stage_heads(tensors) if two_stage else dense_head(tensors),
        (swin if is_swin(tensors) else resnet)(tensors, two_stage=two_stage),
        pyramid(tensors, two_stage=two_stage),
    ]
    if tensors.left:
        raise UserError(
            f"{source} has {len(tensors.left)} tensors that no detector has that can be converted "
            f"({', '.join(sorted(tensors.left))}); remove them if the detector works without."
        )
    state_dict: Dict[str, torch.Tensor] = {}
    settings: Dict[str, Any] = {}
    for part_tensors, part_settings in parts:
        state_dict.update(part_tensors)
        settings.update(part_settings)
    settings.update(_training_settings(checkpoint.config_text, style, settings))
    undecided = [key for key in _required(settings) if key not in (*settings, *opts[::2])]
    if undecided:
        raise UserError(
            f"{source} does not tell {', '.join(undecided)}; append them to the command as KEY VALUE, "
            "those of pixels and strides also by --style."
        )
    flat = [item for pair in settings.items() for item in pair]
    cfg = read_config("", [*flat, *opts], source=f"The config of {source} with the command line's KEY VALUE")
    return Conversion(state_dict, cfg, list(dict.fromkeys([*settings, *opts[::2]])))


def _training_settings(text: str, style: Optional[str], settings: Dict[str, Any]) -> Dict[str, Any]:
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


def _required(settings: Dict[str, Any]) -> List[str]:
    keys = ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"]
    if "MODEL.RESNETS.DEPTH" in settings:
        keys.append("MODEL.RESNETS.STRIDE_IN_1X1")
    if settings["MODEL.META_ARCHITECTURE"] == "OpenMMLabFCOS":
        keys += ["MODEL.FCOS.CENTERNESS_ON", "MODEL.FCOS.CENTER_SAMPLING_RADIUS"]
        if not settings["MODEL.FCOS.REG_MAX"]:
            keys.append("MODEL.FCOS.DISTANCES")
    return keys

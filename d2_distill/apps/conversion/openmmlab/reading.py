"""Reads a checkpoint file of MMEngine or MMCV without either, and without running code that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ....errors import UserError
from .. import read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        state_dict: the detector's tensors.
        config_text: text of the config it was trained with, "" if the file does not hold it.
        class_names: of its outputs, empty if the file does not hold them.
    """

    state_dict: dict[str, torch.Tensor]
    config_text: str = ""
    class_names: list[str] = field(default_factory=list)


def read_checkpoint(path: str) -> Checkpoint:
    """
    Raises:
        UserError: the file is missing, cannot be read, or holds no tensors under "state_dict".
    """
    content = read_tensors(path)
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not (isinstance(state_dict, dict) and state_dict):
        raise UserError(
            f"The checkpoint: {path} has no weights under 'state_dict'; name a checkpoint of MMDetection."
        )
    others = [str(name) for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"The checkpoint: {path} holds {len(others)} entries that are no plain tensors, such as "
            f"{others[0]}; save the detector's state dict anew."
        )
    meta = content.get("meta")
    if not isinstance(meta, dict):
        meta = {}
    texts = [meta.get(key) for key in ("config", "cfg")]
    text = next((text for text in texts if isinstance(text, str)), "")
    return Checkpoint(dict(state_dict), text, _class_names(meta))


def _class_names(meta: dict[str, Any]) -> list[str]:
    data = meta.get("dataset_meta")  # of 3.x; 2.x has the names beside it
    for node in (data if isinstance(data, dict) else {}, meta):
        for key in ("classes", "CLASSES"):
            names = node.get(key)
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return []

"""Reads a checkpoint file of MMEngine or MMCV without either, and without running code that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict

import torch

from ..conversion import read_tensors
from ..errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        state_dict: the detector's tensors.
        config_text: text of the config it was trained with, "" if the file does not hold it.
    """

    state_dict: Dict[str, torch.Tensor]
    config_text: str = ""


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
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []
    return Checkpoint(dict(state_dict), next((text for text in texts if isinstance(text, str)), ""))

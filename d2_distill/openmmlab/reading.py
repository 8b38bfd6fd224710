"""Reads a checkpoint file of MMEngine or MMCV without either, and without running code that it names."""

from __future__ import annotations

import collections
import pickle
from dataclasses import dataclass
from typing import Any, Dict

import torch

from ..checkpoint import readable, require_file
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


def read_tensors(path: str) -> Any:
    """The content of a checkpoint file, with a stand-in for whatever is neither a tensor nor of Python's own types.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    require_file(path, key="The checkpoint")
    with readable(path, key="The checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorPickle)


class _Ignored:
    """Stands for every object that is not a tensor: logs of the trainer, numbers of NumPy, ..."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def _ignore(self, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _ignore


_REBUILDS_TENSORS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _TensorUnpickler(pickle.Unpickler):
    """Knows what tensors are made of; torch itself resolves the names of storages."""

    def find_class(self, module: str, name: str) -> Any:
        return _REBUILDS_TENSORS.get((module, name), _Ignored)


class _TensorPickle:
    """The ``pickle`` given to torch.load: MMEngine's files hold classes that ``weights_only`` refuses."""

    Unpickler = _TensorUnpickler

    @staticmethod
    def load(file, **kwargs) -> Any:
        return _TensorUnpickler(file, **kwargs).load()

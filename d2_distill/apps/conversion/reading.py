"""Reads the tensors of a checkpoint file, and runs no code that it names."""

from __future__ import annotations

import collections
import pickle
from typing import Any

import torch

from ...checkpoint.exact import readable, require_file
from ...checkpoint.harmless import require_no_program


def read_tensors(path: str) -> Any:
    """The content of a checkpoint file, with a stand-in for whatever is neither a tensor nor of Python's own types.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    require_file(path, key="The checkpoint")
    require_no_program(path)
    with readable(path, key="The checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorPickle)


def is_state_dict(value: Any) -> bool:
    """Whether the content of a file is a dict of tensors by their names."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


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
    """The ``pickle`` given to torch.load: files of trainers hold classes that ``weights_only`` refuses."""

    Unpickler = _TensorUnpickler

    @staticmethod
    def load(file, **kwargs) -> Any:
        return _TensorUnpickler(file, **kwargs).load()

"""Weight files that hold data only: reading them runs nothing.

Pickles can name any function and have it called. The files of Detectron2, of Caffe2 and of torch.save need few names:
those of plain containers, of NumPy's arrays and of tensors. Files that name others are refused.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import importlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..config.trust import REMEDY, trusts_files
from ..errors import UserError

# Lets torch.load, where nobody tells it otherwise, run what a file names.
TORCH_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
PICKLES = (".pkl", ".pickle")
# Packages whose trainers put objects of theirs into checkpoints, and what converts those.
CONVERTERS = dict.fromkeys(("mmengine", "mmcv", "mmdet"), "tools/convert_openmmlab.py")


def _latin1(text: str, encoding: str) -> bytes:
    """Encode as pickles of Python 3 in protocol 2 do with bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _load_from_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _numpy(module: str, name: str) -> Any:
    """Return a function of NumPy's own that its pickles name, which moved in version 2."""
    try:
        return getattr(importlib.import_module(f"numpy._core.{module}"), name)
    except ImportError:
        return getattr(importlib.import_module(f"numpy.core.{module}"), name)


# What a pickle of arrays and tensors may name. torch.storage's own _load_from_bytes would unpickle anything.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{
        (module, name): getattr(builtins, name)
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "bytearray", "complex", "slice", "list", "dict", "tuple")
    },
    **{
        (f"numpy.{core}.{module}", name): _numpy(module, name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return ALLOWED[module, name]


def require_harmless(path: str) -> None:
    """Read a weight file for the first time, without running what it names.

    Raises:
        UserError: it contains more than data, or is a TorchScript archive.
        Exception: whatever reading a damaged file raises.
    """
    require_no_program(path)
    if trusts_files():
        return
    try:
        if path.endswith(PICKLES):
            with open(path, "rb") as file:
                _Unpickler(file, encoding="latin1").load()  # written by Python 2
        else:
            # Mapped, so that the tensors are read once, by whom they are for.
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) (\w[\w.]*)", str(error))  # as of torch 2.5, and before
        if found is None:
            raise
        name = found[1]
        converter = CONVERTERS.get(name.partition(".")[0])
        remedy = f"convert it with {converter}" if converter else f"name a file of tensors only or, {REMEDY}"
        raise UserError(f"{path} contains more than tensors: reading it would call {name}; {remedy}.") from error


def require_no_program(path: str) -> None:
    """
    Raises:
        UserError: the file is a TorchScript archive, which torch.load would hand to torch.jit.load.
    """
    if is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript program, not a checkpoint; name the weights that it was exported from."
        )


def is_torchscript(path: str) -> bool:
    """Return whether a file is an archive of torch.jit.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" or "/code/" in name for name in archive.namelist())


@contextlib.contextmanager
def as_trusted() -> Iterator[None]:
    """Let torch.load inside follow the switch of :mod:`~d2_distill.config.trust`."""
    before = os.environ.get(TORCH_SWITCH)
    if trusts_files():
        os.environ[TORCH_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TORCH_SWITCH, None)
        else:
            os.environ[TORCH_SWITCH] = before

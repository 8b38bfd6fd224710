"""Reads what people save of a torchvision detector."""

from __future__ import annotations

import re

import torch

from ....errors import UserError
from .. import is_state_dict, read_tensors

# Where trainers put the state dict; "model" is that of torchvision's references.
_NESTS = ("model", "state_dict", "model_state_dict")
# What DistributedDataParallel and torch.compile put in front of names.
_WRAPPERS = r"(?:module\.|_orig_mod\.)+"


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds a state dict, plain or in a dict of a trainer; code that it names is not run.

    Raises:
        UserError: the file is missing or cannot be read, or holds no state dict.
    """
    content = read_tensors(path)
    candidates = [content, *(content.get(name) for name in _NESTS)] if isinstance(content, dict) else []
    for state in candidates:
        if is_state_dict(state):
            return {re.sub(f"^{_WRAPPERS}", "", name): value for name, value in state.items()}
    raise UserError(
        f"The checkpoint: {path} holds no state dict of a detector, plain or under {', '.join(_NESTS)}; "
        "save model.state_dict()."
    )

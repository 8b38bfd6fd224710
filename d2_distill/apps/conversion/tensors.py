"""A state dict that the parts of a converter take their tensors out of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from ...errors import UserError

# Of a part of a detector: tensors by our names, and the config keys that the shapes tell.
Converted = tuple[dict[str, torch.Tensor], dict[str, Any]]


class Tensors:
    """Patterns are regular expressions for whole names.

    Args:
        state_dict: by their names.
        source: what error messages call it.

    Attributes:
        left: what nobody has taken.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor], source: str) -> None:
        self.left = dict(state_dict)
        self.source = source

    def names(self, pattern: str) -> list[str]:
        return [name for name in self.left if re.fullmatch(pattern, name)]

    def shape(self, pattern: str) -> torch.Size:
        """Of the one tensor with such a name.

        Raises:
            UserError: there is none.
        """
        names = self.names(pattern)
        if not names:
            name = pattern.replace("\\", "")
            raise UserError(f"{self.source} lacks {name}; convert a complete checkpoint.")
        return self.left[names[0]].shape

    def take(self, rules: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """Remove all tensors whose names fit a rule (pattern, new name as for ``re.sub``).

        Returns:
            Them, by their new names.
        """
        taken = {}
        for pattern, template in rules:
            for name in self.names(pattern):
                taken[re.fullmatch(pattern, name).expand(template)] = self.left.pop(name)
        return taken

    def require_none_left(self) -> None:
        """
        Raises:
            UserError: nobody has taken some of them.
        """
        if self.left:
            raise UserError(
                f"{self.source} has {len(self.left)} tensors that no detector has that can be converted "
                f"({', '.join(sorted(self.left))}); remove them if the detector works without."
            )

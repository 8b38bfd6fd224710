"""Everything known about the objects of one image, as fields of equal length."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class Instances:
    """Named per-object fields (tensors, ``Boxes``, lists) of one image, read and written as attributes.

    Names that begin with an underscore are plain attributes and not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """``image_size`` is (height, width); keywords are the first fields."""
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"These Instances have no field '{name}'.")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field; AssertionError if its length differs from that of the others."""
        assert not self._fields or len(value) == len(self), \
            f"Field '{name}' has {len(value)} elements, but there are {len(self)} objects."
        self._fields[name] = value

    def has(self, name: str) -> bool:
        return name in self._fields

    def get_fields(self) -> dict[str, Any]:
        """The fields by name, not a copy."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """New Instances with ``to`` applied to every field that has it."""
        moved = {name: value.to(*args, **kwargs) if hasattr(value, "to") else value
                 for name, value in self._fields.items()}
        return Instances(self._image_size, **moved)

    def __getitem__(self, item: int | slice | Tensor) -> "Instances":
        """The selected objects; an int selects a set of one."""
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"There is no object {item} among {len(self)}.")
            item = slice(item, item + 1 or None)
        return Instances(self._image_size, **{name: value[item] for name, value in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("The number of objects is not known before there is a field.")

    def __iter__(self):
        raise NotImplementedError("Instances cannot be iterated over; index them or use their fields.")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Concatenate objects of images of the same size; a list of one gives that very element."""
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        for other in instance_lists[1:]:
            assert other.image_size == first.image_size, f"{other.image_size} differs from {first.image_size}"
        return Instances(first.image_size, **{
            name: _concatenate([instances.get_fields()[name] for instances in instance_lists])
            for name in first.get_fields()
        })

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return f"Instances(image_size={self._image_size}, fields=[{fields}])"


def _concatenate(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return list(itertools.chain.from_iterable(values))
    return type(values[0]).cat(values)

"""DatasetCatalog (name -> function that loads dataset dicts) and MetadataCatalog (name -> Metadata)."""

from __future__ import annotations

import builtins
from collections import UserDict
from types import SimpleNamespace
from typing import Any, Callable


class _Catalog(UserDict):
    def list(self) -> builtins.list[str]:
        return [*self]

    def remove(self, name: str) -> None:
        del self[name]


class _DatasetCatalog(_Catalog):
    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Remember how to load a data set; AssertionError if the name is taken."""
        assert name not in self, f"Data set '{name}' is already registered."
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Load a data set: a list of dataset dicts. KeyError, with the known names, if unregistered."""
        if name not in self:
            raise KeyError(f"Data set '{name}' is not registered; registered are: {', '.join(self)}.")
        return self[name]()


class Metadata(SimpleNamespace):
    """Facts about a data set that all its users share; an attribute that is set keeps its value.

    Raises:
        AssertionError: an attribute is set to a value other than the one it has.
        AttributeError: an attribute that was never set is read.
    """

    def __getattr__(self, key: str) -> Any:
        # reached only when normal lookup failed
        name, known = vars(self).get("name"), ", ".join(vars(self))
        raise AttributeError(f"The metadata of data set '{name}' have no '{key}', only {known}.")

    def __setattr__(self, key: str, value: Any) -> None:
        old = vars(self).get(key, value)
        assert old == value, f"'{key}' of data set '{self.name}' is already {old!r}, refusing {value!r}."
        super().__setattr__(key, value)

    def set(self, **attributes: Any) -> Metadata:
        for key, value in attributes.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return vars(self).get(key, default)


class _MetadataCatalog(_Catalog):
    def get(self, name: str) -> Metadata:
        """The data set's metadata, created empty on first use."""
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()

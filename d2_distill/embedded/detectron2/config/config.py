"""``CfgNode`` (YACS with ``_BASE_`` and ``VERSION``), ``get_cfg`` and the ``configurable`` decorator."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, Callable

from detectron2.utils.file_io import PathManager
from fvcore.common.config import CfgNode as BaseCfgNode


class CfgNode(BaseCfgNode):
    """A tree of settings. Merging checks that keys exist and that types match.

    A file may name another one to start from with ``_BASE_: path relative to it``.
    """

    @classmethod
    def _open_cfg(cls, filename: str):
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Overwrite settings by those of a YAML file.

        Args:
            cfg_filename: path or address, see ``PathManager``.
            allow_unsafe: let the file build Python objects, as the model zoo's RetinaNet does. An untrusted
                file can then run any code.

        Raises:
            AssertionError: the file does not exist, or its VERSION is newer than this one.
            KeyError: the file has an unknown key.
            NotImplementedError: its VERSION is older than this one.
        """
        assert PathManager.isfile(cfg_filename), f"There is no config file '{cfg_filename}'."
        loaded = type(self)(self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe))
        version = loaded.get("VERSION")
        if version is None:
            logging.getLogger(__name__).warning(
                "Config '%s' names no VERSION; it is read as one of VERSION %s.", cfg_filename, self.VERSION)
            version = self.VERSION
        found = f"Config '{cfg_filename}' has VERSION {version}"
        assert version <= self.VERSION, f"{found}, this Detectron2 knows up to {self.VERSION}."
        if version < self.VERSION:
            raise NotImplementedError(f"{found}, which only the real Detectron2 can upgrade; rename its keys "
                                      f"to those of VERSION {self.VERSION}.")
        self.merge_from_other_cfg(loaded)


def get_cfg() -> CfgNode:
    """A copy of the default configuration."""
    from .defaults import _C

    return _C.clone()


def configurable(init_func: Callable) -> Callable:
    """Let an ``__init__`` with explicit arguments also be called with a config.

    Its class has ``@classmethod from_config(cls, cfg, ...)``. A call whose first argument, or keyword
    ``cfg``, is a ``CfgNode`` is translated: ``from_config`` gets the arguments that it accepts and returns
    the explicit arguments; further keywords of the call override those.

    Raises:
        AttributeError: at the call, if there is no ``from_config``.
        TypeError: at the call, if it is not a classmethod, or its first parameter is not called ``cfg``.
    """

    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        name = type(self).__name__
        from_config = getattr(type(self), "from_config", None)
        if from_config is None:
            raise AttributeError(f"{name} has a @configurable __init__, but no classmethod from_config.")
        if not inspect.ismethod(from_config):
            raise TypeError(f"{name}.from_config must be a classmethod.")
        if any(isinstance(value, BaseCfgNode) for value in (*args[:1], kwargs.get("cfg"))):
            args, kwargs = (), _explicit_arguments(from_config, args, kwargs)
        init_func(self, *args, **kwargs)

    return wrapped


def _explicit_arguments(from_config: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument.")
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return from_config(*args, **kwargs)
    accepted = {name: value for name, value in kwargs.items() if name in parameters}
    overrides = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**from_config(*args, **accepted), **overrides}

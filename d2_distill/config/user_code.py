"""Python files of the user's own, named by ``IMPORTS``: methods, detectors, data sets, and their config keys."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from detectron2.config import CfgNode

from ..errors import UserError


def add_user_config(cfg: CfgNode, paths: Sequence[str]) -> None:
    """Import the files, and let those that have a function ``add_config(cfg)`` add their keys.

    Raises:
        UserError: a path names no Python file. Errors of the files themselves are passed on as they are.
    """
    for path in paths:
        module = import_file(path)
        if hasattr(module, "add_config"):
            module.add_config(cfg)


def import_file(path: str) -> ModuleType:
    """Run a Python file as a module, once for all who name it: what it registers may be registered only once."""
    name = os.path.realpath(path)
    if not (name.endswith(".py") and os.path.isfile(name)):
        raise UserError(
            f"IMPORTS names {path}, which is no Python file; give its path relative to the working directory, "
            f"{os.getcwd()}."
        )
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

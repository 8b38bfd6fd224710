"""Python files of the user's own, named by ``IMPORTS``: methods, detectors, data sets, and their config keys."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from detectron2.config import CfgNode

from ..errors import UserError

# What the names of the modules start with.
PACKAGE = "d2_distill_imports"


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
    file = os.path.realpath(path)
    if not (file.endswith(".py") and os.path.isfile(file)):
        raise UserError(
            f"IMPORTS names {path}, which is no Python file; give its path relative to the working directory, "
            f"{os.getcwd()}."
        )
    # An identifier for each file: TorchScript writes it into what is exported.
    stem = re.sub(r"\W", "_", os.path.basename(file)[: -len(".py")])
    name = f"{PACKAGE}.{stem}_{hashlib.sha256(file.encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

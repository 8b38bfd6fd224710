"""Read a config file and its overrides into one validated config."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode as CN

from ..errors import UserError
from .keys import get_distill_cfg
from .user_code import add_user_config
from .yaml_files import as_text, read_yaml

logger = logging.getLogger(__name__)


def read_config(config_file: str, opts: Sequence, *, source: str) -> CN:
    """The defaults, overridden by a config file ("" for none), overridden by a flat list of keys and values.

    Args:
        source: what the error message calls the config.

    Raises:
        UserError: the file is missing or malformed, a key or the type of a value is wrong, or ``IMPORTS`` names no
            Python file.
    """
    cfg = get_distill_cfg()
    for option in opts:
        if str(option).startswith("--"):  # argparse takes all that follows a key for keys and values
            raise UserError(f"{option} stands behind config keys; name options before them.")
    with _in_one_sentence(source):
        values = _file_values(config_file)
        imports = _imports(values, opts)
    if imports and not _is_below_working_directory(config_file):
        logger.warning(
            "%s lies outside of the working directory and runs these files of yours (IMPORTS): %s", config_file, ", ".join(imports)
        )
    add_user_config(cfg, imports)
    with _in_one_sentence(source):
        cfg.MODEL.DISTILL.METHODS = None  # so that a single name may stand without brackets: METHODS: auto
        if config_file:
            _merge(cfg, values, os.path.basename(config_file))
        cfg.merge_from_list(list(opts))
    methods = cfg.MODEL.DISTILL.METHODS
    cfg.MODEL.DISTILL.METHODS = (methods,) if isinstance(methods, str) else tuple(methods or ())
    return cfg


def use_available_device(cfg: CN) -> None:
    """Let the CPU take the place of a GPU that is not there, and say so."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s, but there is no GPU: using the CPU.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def split_overrides(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """``["a.jpg", "MODEL.WEIGHTS", "w.pth"]`` to files, and config keys with their values, which argparse mixes up."""
    nodes = get_distill_cfg()
    for index, value in enumerate(values):
        if value.split(".")[0] in nodes and not os.path.exists(value):
            return list(values[:index]), list(values[index:])
    return list(values), []


@contextlib.contextmanager
def _in_one_sentence(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever Detectron2, yacs or the YAML parser raise on a malformed file
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise UserError(f"{source} is not valid: {reason.rstrip('.!')}; correct it.") from error


def _file_values(config_file: str) -> dict[str, Any]:
    if config_file.endswith(".py"):
        raise UserError(
            f"{config_file} is a LazyConfig of Detectron2; name a YAML config, which is what train_net.py and its teachers "
            "are described by."
        )
    return read_yaml(config_file) if config_file else {}


def _merge(cfg: CN, values: Mapping[str, Any], name: str) -> None:
    """Merge a file's values as Detectron2 merges a file, which also brings older versions up to date."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(as_text(values))
        cfg.merge_from_file(path, allow_unsafe=False)


def _imports(values: Mapping[str, Any], opts: Sequence) -> Sequence[str]:
    """Read ``IMPORTS`` first: the imported files add keys that the rest of the config uses."""
    cfg = CN({"IMPORTS": ()})
    cfg.merge_from_other_cfg(CN({"IMPORTS": values.get("IMPORTS", ())}))
    given = dict(zip(opts[::2], opts[1::2]))
    cfg.merge_from_list(["IMPORTS", given.get("IMPORTS", cfg.IMPORTS)])
    return cfg.IMPORTS


def _is_below_working_directory(path: str) -> bool:
    return not path or os.path.realpath(path).startswith(os.path.join(os.path.realpath(os.getcwd()), ""))

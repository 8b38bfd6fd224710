"""Read a config file and its overrides into one validated config."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode as CN
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .keys import get_distill_cfg
from .user_code import add_user_config

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
        imports = _imports(config_file, opts)
    add_user_config(cfg, imports)
    with _in_one_sentence(source):
        cfg.MODEL.DISTILL.METHODS = None  # so that a single name may stand without brackets: METHODS: auto
        if config_file:
            cfg.merge_from_file(config_file)
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
    except Exception as error:  # whatever Detectron2, yacs or the YAML parser raise on a malformed file
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise UserError(f"{source} is not valid: {reason.rstrip('.!')}; correct it.") from error


def _imports(config_file: str, opts: Sequence) -> Sequence[str]:
    """``IMPORTS``, which is to be known before the keys that the files add can be read."""
    cfg = CN({"IMPORTS": ()})
    # Where there is no file, merging it will say so.
    if config_file and PathManager.isfile(config_file):
        values = CN.load_yaml_with_base(config_file, allow_unsafe=True)
        cfg.merge_from_other_cfg(CN({"IMPORTS": values.get("IMPORTS", ())}))
    values = dict(zip(opts[::2], opts[1::2]))
    cfg.merge_from_list(["IMPORTS", values.get("IMPORTS", cfg.IMPORTS)])
    return cfg.IMPORTS

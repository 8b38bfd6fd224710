"""A teacher that is given in a word or two, as on a command line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from detectron2.config import CfgNode

from ..errors import UserError

logger = logging.getLogger(__name__)
OPTION = "--teacher"
NODE = "MODEL.DISTILL.TEACHER"
# Checkpoints of a run, the one to take first; after them the last periodic one.
PREFERRED = ("model_best.pth", "model_final.pth")


def name_teacher(cfg: CfgNode, words: Sequence[str]) -> None:
    """Let a config distil: its detector becomes the student of the teacher that the words name.

    ``MODEL.DISTILL.METHODS`` and ``BALANCE`` become "auto" where the config leaves them empty. Without words the config
    stays as it is.

    Args:
        words: the folder of a run; or a config file, or the name of a config of Detectron2's model zoo, with or without
            the checkpoint after it.

    Raises:
        UserError: there are more than two words, or the folder has no config or no checkpoint.
    """
    if not words:
        return
    if len(words) > 2:
        raise UserError(
            f"{OPTION} has {len(words)} values ({' '.join(words)}); give the folder of a run, or a config and its weights, "
            "and name other options before it."
        )
    node = cfg.MODEL.DISTILL
    node.TEACHER.CONFIG_FILE, node.TEACHER.WEIGHTS = words[0], words[1] if len(words) == 2 else ""
    resolve_run_folder(cfg, key=OPTION)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        node.STUDENT, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "Distiller"
    node.METHODS = node.METHODS or ("auto",)
    node.BALANCE = node.BALANCE or "auto"


def resolve_run_folder(cfg: CfgNode, *, key: str = f"{NODE}.CONFIG_FILE") -> None:
    """Where the teacher's config file is the folder of a run, put the run's config and checkpoint in its place.

    Args:
        key: what error messages call the folder.

    Raises:
        UserError: the folder has no config or no checkpoint.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    folder = node.CONFIG_FILE
    if not os.path.isdir(folder):
        return
    config = os.path.join(folder, "config.yaml")
    if not os.path.isfile(config):
        raise UserError(f"{key}: the folder {folder} has no config.yaml, so it is not that of a run; name the teacher's.")
    node.CONFIG_FILE = config
    if not node.WEIGHTS:
        node.WEIGHTS = find_checkpoint(folder, key=key)


def find_checkpoint(folder: str, *, key: str) -> str:
    """Return the path of a run's best checkpoint, else of its final one, else of its last; log which of several it is.

    Args:
        key: what error messages call the folder.

    Raises:
        UserError: there is none.
    """
    periodic = sorted(name for name in os.listdir(folder) if re.fullmatch(r"model_\d+\.pth", name))
    found = [name for name in PREFERRED if os.path.isfile(os.path.join(folder, name))] + periodic[::-1]
    if not found:
        raise UserError(
            f"{key}: the folder {folder} has no checkpoint ({', '.join(PREFERRED)} or model_0000000.pth), so it teaches "
            "nothing; train the teacher first, or name its weights."
        )
    if len(found) > 1:
        logger.info("%s: of the %d checkpoints in %s, taking %s.", key, len(found), folder, found[0])
    return os.path.join(folder, found[0])

"""One process at a time in an output folder."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from detectron2.utils import comm

from ..errors import UserError, sentence_of

logger = logging.getLogger(__name__)

# The folders of this process, by their descriptors: a lock lasts as long as its descriptor, at most as long as the process.
_locked: dict[str, int] = {}


def lock_folder(folder: str) -> None:
    """Make the folder, and keep other runs out of it until this process ends, however it ends.

    To be called in all processes; the main one locks.

    Raises:
        UserError: in all of them, if another run uses the folder or it cannot be made.
    """
    refusal = _lock(folder) if comm.is_main_process() else None
    refusal = comm.all_gather(refusal)[0]
    if refusal:
        raise UserError(refusal)


def _lock(folder: str) -> str | None:
    path = os.path.realpath(folder)
    if path in _locked:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        return f"OUTPUT_DIR: {sentence_of(error)}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return f"OUTPUT_DIR {folder} is in use by another run; wait for its end, or name another folder."
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        logger.warning("OUTPUT_DIR %s cannot be locked (%s): start no second run in it.", folder, error.strerror)
        return None
    _locked[path] = descriptor
    return None


def _leave_to_the_parent() -> None:
    """A child that outlives its parent, such as a worker of a loader, must not keep the folder locked."""
    for descriptor in _locked.values():
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)

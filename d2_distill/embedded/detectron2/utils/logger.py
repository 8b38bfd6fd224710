"""``setup_logger``: what goes to the console and to the log file, and how it looks."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys

from termcolor import colored

from .file_io import PathManager

_LEVEL_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Formatter(logging.Formatter):
    """Shows loggers below ``name`` as ``abbrev_name.*``; on a console, levels from WARNING on only."""

    def __init__(self, name: str, abbrev_name: str, console: bool):
        header = "[%(asctime)s] %(shown_name)s "
        if console:
            header = colored("[%(asctime)s %(shown_name)s]: ", "green")
        super().__init__("%(level_before)s" + header + "%(level_after)s%(message)s", datefmt="%m/%d %H:%M:%S")
        self._prefix, self._abbrev_prefix, self._console = f"{name}.", f"{abbrev_name}.", console

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.shown_name = record.name
        if record.name.startswith(self._prefix):
            record.shown_name = self._abbrev_prefix + record.name[len(self._prefix):]
        record.level_before, record.level_after = "", ""
        if not self._console:
            record.level_after = f"{record.levelname}: "
        elif record.levelno in _LEVEL_COLORS:
            record.level_before = colored(record.levelname, _LEVEL_COLORS[record.levelno]) + " "
        return super().formatMessage(record)


@functools.lru_cache()  # a second call must not add handlers
def setup_logger(
    output: str | None = None, distributed_rank: int = 0, *, name: str = "detectron2",
    abbrev_name: str | None = None,
) -> logging.Logger:
    """Let logger ``name`` write to the console (rank 0 only) and to a file.

    Args:
        output: the folder of ``log.txt`` (on rank N > 0 of ``log.txt.rankN``); None for no file.
        abbrev_name: stands for ``name`` in the names of its child loggers; by default "d2" for detectron2.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if abbrev_name is None:
        abbrev_name = "d2" if name == "detectron2" else name

    streams = [(sys.stdout, True)] if distributed_rank == 0 else []
    if output:
        suffix = f".rank{distributed_rank}" if distributed_rank > 0 else ""
        streams.append((_open_log(output, f"log.txt{suffix}"), False))
    for stream, console in streams:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_Formatter(name, abbrev_name, console))
        logger.addHandler(handler)
    return logger


@functools.lru_cache()  # loggers of several names share one file
def _open_log(folder: str, name: str):
    PathManager.mkdirs(folder)
    stream = PathManager.open(os.path.join(folder, name), "a", buffering=1)
    atexit.register(stream.close)
    return stream

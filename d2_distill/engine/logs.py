"""What a run logs before its log file exists, what it keeps out of it, and what happens when it cannot be written."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keep what is logged inside until the end, when ``default_setup`` has opened the console and the file.

    After an exception it is dropped: the error is all there is to say.
    """
    root, holder = logging.getLogger(), logging.handlers.BufferingHandler(capacity=sys.maxsize)
    level = root.level
    root.addHandler(holder)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(holder)
        root.setLevel(level)
    for record in holder.buffer:
        logging.getLogger(record.name).handle(record)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Log nothing inside, where something is tried that will be done, and logged, later."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _log_files() -> Iterator[logging.StreamHandler]:
    for name in ("", "detectron2", "fvcore", "d2_distill"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream not in (sys.stdout, sys.stderr):
                yield handler


def raise_when_full() -> None:
    """Let a log file that cannot be written end the run, where logging would print a traceback for each line."""

    def handle(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise error

    for handler in _log_files():
        handler.handleError = handle


def close_log_files() -> None:
    """Close them now, so that nothing fails to be written when Python ends."""
    for handler in list(_log_files()):
        with contextlib.suppress(OSError, ValueError):
            handler.stream.close()

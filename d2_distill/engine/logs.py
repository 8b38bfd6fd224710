"""Keeps what a run logs before its log file exists, and what it tries beforehand out of it."""

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

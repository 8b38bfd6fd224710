"""How far a tool is."""

from __future__ import annotations

import sys


class Progress:
    """One line on the screen that the next one overwrites; in a log file the first of each kind.

    The kind of a line is what stands before its colon; "" ends the line.
    """

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        kind = text.partition(":")[0]
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif kind and kind != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = kind

"""How far a tool is."""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_REPORTS = 5.0


class Progress:
    """One line on the screen that the next one overwrites; in a log file the first of each kind.

    The kind of a line is what stands before its colon; "" ends the line, and so does the end of a ``with`` block.
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

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        """The line ends, whatever comes."""
        self("")


class StepProgress:
    """Prints to the standard error how many steps are done and how fast, some seconds apart.

    Args:
        what: of what, e.g. "images" or "frames of NAME".
        total: None if unknown.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what = what
        self.total = f" of {total}" if total else ""
        self.done = 0
        self._start = self._reported = time.monotonic()
        self._told = -1

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self.report()

    def report(self) -> None:
        """Unless that was the last thing said."""
        if self.done == self._told:
            return
        self._told = self.done
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        unit = self.what.split()[0]
        number = f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
        print(f"{self.done}{self.total} {self.what}, {number} {unit}/s", file=sys.stderr, flush=True)

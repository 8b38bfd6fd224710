"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def partial_path(target: Path) -> Path:
    """Where a file is written before it gets its name; of the same format by its suffix."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, which becomes ``target`` in the end; after an exception nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)

"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, which becomes ``target`` in the end; after an exception nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays the last, since formats are known by it.
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)

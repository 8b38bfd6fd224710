"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError, sentence_of


def partial_path(target: Path) -> Path:
    """Return where a file is written before it gets its name; of the same format by its suffix."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Context manager: a path beside ``target`` to write to, which becomes ``target`` in the end.

    The content is on the disk before the file gets its name, so that a crash leaves the old file or the new one. After an
    exception nothing new is left.

    Raises:
        UserError: it cannot be written, for want of space, say.
    """
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        os.replace(partial, target)
        _flush(target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {sentence_of(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def require_free(path: Path, *, overwrite: bool, option: str) -> None:
    """
    Args:
        option: that names the path, for the message.

    Raises:
        UserError: the path exists, and it is not to be overwritten.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{option}: {path} exists; name another path, or add --overwrite.")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)

"""The errors that are the user's to fix, and how a tool reports them."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """One sentence that names the config key, file or image at fault and the remedy.

    ``train_net.py`` and the tools print it without a traceback and exit with status 1.
    """


# A disk or a quota that is used up, and a file of the largest size that is allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Files that may not be written.
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class PairError(UserError):
    """A method cannot serve this student with this teacher, or without one, whatever the method's own keys are."""


def sentence_of(error: Exception) -> str:
    """Return what is reported of an error that is the user's to fix: a UserError, or a file that cannot be read or written."""
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}there is no space left ({error.strerror}); free some and continue, or name another path."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); name another path, or fix this one."
    return str(error)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Around all that a tool does: a user's error ends it with one sentence and status 1, Ctrl-C with status 130."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {sentence_of(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

"""The errors that are the user's to mend, and how a tool reports them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """One sentence that names the config key, file or image at fault and the remedy.

    ``train_net.py`` and the tools print it without a traceback and exit with status 1.
    """


class PairError(UserError):
    """A method cannot serve this student with this teacher, or without one, whatever the method's own keys are."""


def sentence_of(error: Exception) -> str:
    """What is told of an error that is the user's to mend: a UserError, or a file that cannot be read or written."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); name another path, or mend this one."
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

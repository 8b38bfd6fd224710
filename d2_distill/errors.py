"""The errors that are the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """One sentence that names the config key, file or image at fault and the remedy.

    ``train_net.py`` and the tools print it without a traceback and exit with status 1.
    """


class PairError(UserError):
    """A method cannot serve this student with this teacher, or without one, whatever the method's own keys are."""

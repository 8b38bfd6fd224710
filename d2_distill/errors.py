"""The error that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """One sentence that names the config key, file or image at fault and the remedy.

    ``train_net.py`` and the tools print it without a traceback and exit with status 1.
    """

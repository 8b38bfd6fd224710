"""Whether what files contain may be run."""

from __future__ import annotations

import os

# Set to 1 by those who trust all files that they name. Everything else reads data only.
SWITCH = "D2_DISTILL_TRUST_FILES"
REMEDY = f"if you trust where it comes from, set the environment variable {SWITCH}=1 to let it"


def trusts_files() -> bool:
    """Return whether weights and configs may run the code that they contain."""
    return os.environ.get(SWITCH, "") == "1"

"""Chooses which Detectron2 is imported: the installed one, or the embedded subset where there is none."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path

ENVIRONMENT_VARIABLE = "D2_DISTILL_PROVIDER"
_EMBEDDED = str(Path(__file__).parent / "embedded")


def select() -> None:
    """Make ``import detectron2`` work; must run before its first import.

    A real installation wins (the embedded folder is appended to ``sys.path``), unless the environment says
    ``D2_DISTILL_PROVIDER=embedded`` (then it is put first); ``real`` refuses the embedded one.

    Raises:
        ImportError: the variable has another value, or asks for a real Detectron2 that is not installed.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if wanted not in ("auto", "embedded", "real"):
        raise ImportError(f"{ENVIRONMENT_VARIABLE} is {wanted!r}; set it to auto, embedded or real.")
    if wanted == "embedded":
        if _EMBEDDED not in sys.path:
            sys.path.insert(0, _EMBEDDED)
    elif importlib.util.find_spec("detectron2") is None:
        if wanted == "real":
            raise ImportError(f"{ENVIRONMENT_VARIABLE}=real, but Detectron2 is not installed; install it.")
        sys.path.append(_EMBEDDED)
    _hide_deprecations()


def _hide_deprecations() -> None:
    """Of torch functions that the real Detectron2 and fvcore call, which nobody who trains can mend."""
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, append=True)
    warnings.filterwarnings("ignore", r"torch\.meshgrid: in an upcoming release", UserWarning, append=True)


def name() -> str:
    """``"embedded"`` or ``"real"``: which Detectron2 is in use."""
    import detectron2

    return "embedded" if getattr(detectron2, "__embedded__", False) else "real"

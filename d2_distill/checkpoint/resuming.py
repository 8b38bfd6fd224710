"""Which checkpoint of a run's folder a training continues from."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from ..errors import UserError

POINTER = "last_checkpoint"
# Names of a run's checkpoints; that of the best evaluation holds no state of the training.
NAMES = re.compile(r"model_(?:\d{7}|final)\.pth")

logger = logging.getLogger(__name__)


def find_resumable(folder: str) -> str:
    """Return the path of the checkpoint to continue from, "" for a folder without any.

    It is the one that ``last_checkpoint`` names, or a newer one if the run was killed before it could be named there. One that
    is damaged is passed over, with a warning, for the newest that is whole.

    Raises:
        UserError: there are checkpoints, but none that is whole and holds the state of a training.
    """
    place = Path(folder)
    found = sorted(path for path in place.glob("model_*.pth") if NAMES.fullmatch(path.name)) if place.is_dir() else []
    if not found:
        return ""
    named = _named(place)
    wholes = {path: iteration for path in found if (iteration := trained_until(path)) is not None}
    if not wholes:
        raise UserError(
            f"OUTPUT_DIR {folder} has no checkpoint to continue from: {', '.join(path.name for path in found)} "
            f"{'is' if len(found) == 1 else 'are'} damaged or without the state of the training; restore one, or name "
            "another folder."
        )
    newest = max(wholes, key=lambda path: (wholes[path], path.name))
    if named in wholes:
        pointed = (place / POINTER).stat().st_mtime_ns
        later = [path for path in wholes if path.stat().st_mtime_ns > pointed and wholes[path] > wholes[named]]
        chosen = max(later, key=wholes.get) if later else named
        reason = f"{POINTER} names {named.name}, but this one is newer" if later else ""
    else:
        chosen = newest
        reason = f"{POINTER} is missing" if named is None else f"{named.name}, which {POINTER} names, is damaged or missing"
    if reason:
        logger.warning("Continuing from %s, the newest checkpoint that is whole: %s.", chosen, reason)
    return str(chosen)


def _named(place: Path) -> Path | None:
    """Return the checkpoint that the pointer names, which lies in the same folder."""
    try:
        name = (place / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return place / os.path.basename(name) if name else None


def trained_until(path: Path) -> int | None:
    """Return the iteration of a checkpoint that is whole and holds the state of a training, else None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
        return None
    if not isinstance(content, dict) or "trainer" not in content or not isinstance(content.get("iteration"), int):
        return None
    return content["iteration"]

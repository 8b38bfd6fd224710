"""Notice on resuming that the teacher has been exchanged."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..teacher import Teacher

ENTRY = "teacher"


class TeacherIdentity:
    """The part of a checkpoint that says which teacher a run learns from.

    Args:
        teacher: as it is now.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._fingerprint = teacher.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the run that is resumed had another teacher.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                f"MODEL.DISTILL.TEACHER.WEIGHTS: the teacher's weights have changed since this run began (fingerprint "
                f"{state['fingerprint']}, now {self._fingerprint}); restore the old file, or begin a run in another OUTPUT_DIR."
            )


def require_same_teacher(checkpoint: str, teacher: Teacher) -> None:
    """
    Args:
        checkpoint: path of the one that a run is resumed from.

    Raises:
        UserError: the run had another teacher. One of an earlier version does not say which.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    if ENTRY in content:
        TeacherIdentity(teacher).load_state_dict(content[ENTRY])

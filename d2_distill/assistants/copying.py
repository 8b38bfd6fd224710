"""Assistants that start from the teacher's head."""

from __future__ import annotations

from torch import nn

from ..errors import UserError


def copy_weights(assistant: nn.Module, teacher: nn.Module) -> None:
    """Copy every parameter and buffer of the assistant from the teacher's of the same name.

    Raises:
        UserError: one of them is missing in the teacher or of another shape.
    """
    theirs = teacher.state_dict()
    for name, value in assistant.state_dict().items():
        shape = tuple(theirs[name].shape) if name in theirs else "missing"
        if shape != tuple(value.shape):
            raise UserError(
                f"The assistant cannot start as a copy of the teacher's head: {name} is {tuple(value.shape)} in the "
                f"assistant and {shape} in the teacher; give student and teacher the same MODEL.FPN.OUT_CHANNELS, "
                "or set MODEL.DISTILL.HEAD.ASSISTANT_INIT to 'fresh'."
            )
        value.copy_(theirs[name])

"""How good a teacher is on the labels of the training data, beside its student."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from ..losses.reduction import mean_over_processes
from ..staged import DenseRun, StagedDetector
from .pairing import same_anchors

# Running mean of Detectron2's dense detectors, which an extra evaluation of the losses must not move.
NORMALIZER = "loss_normalizer"


def outputs_alike(student: StagedDetector, teacher: StagedDetector) -> bool:
    """Return whether the student's losses can be computed for the teacher's outputs as well."""
    if not student.family == teacher.family == "dense" or student.kind != teacher.kind:
        return False
    same_sizes = (student.num_classes, student.reg_max) == (teacher.num_classes, teacher.reg_max)
    same_cells = student.strides == teacher.strides and student.size_divisibility == teacher.size_divisibility
    return same_sizes and same_cells and same_anchors(student, teacher)


@torch.no_grad()
def losses_on_labels(student: DenseRun, teacher: DenseRun) -> dict[str, float]:
    """Return the sum of the student's own losses for the outputs of ``"teacher"`` and of ``"student"``.

    The outputs must be alike, see :func:`outputs_alike`. The sums are averaged over the processes. Waits for the device.
    """
    own = sum(student.losses.values())
    with get_event_storage().name_scope("teacher"), _kept(student.staged.innermost, NORMALIZER):
        others = student.staged.losses(student.grid, teacher.outputs, student.assignment)
    sums = mean_over_processes(torch.stack([sum(others.values()), own]))
    return dict(zip(("teacher", "student"), sums.tolist()))


@contextlib.contextmanager
def _kept(module: nn.Module, name: str) -> Iterator[None]:
    """Give an attribute of a module, if it has it, its value back."""
    has, value = hasattr(module, name), getattr(module, name, None)
    try:
        yield
    finally:
        if has:
            setattr(module, name, value)

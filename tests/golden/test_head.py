"""Parity with numbers of the published HEAD code: schedules, imitation, proposals, assistants, whole losses."""

from __future__ import annotations

import pytest

from .cases import case_names, load
from .checks import head_assist, head_basics, head_proposals, head_rois, head_teacher_free
from .dispatch import run_check

SUITE = "head"
CHECKS = {
    **head_assist.CHECKS,
    **head_basics.CHECKS,
    **head_proposals.CHECKS,
    **head_rois.CHECKS,
    **head_teacher_free.CHECKS,
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    run_check(name, load(SUITE, name), CHECKS)

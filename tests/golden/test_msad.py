"""Parity with numbers of the published MSAD code."""

from __future__ import annotations

import pytest

from .cases import case_names, load
from .checks import msad_checkpoints, msad_head, msad_losses, msad_slimmable, msad_steps, msad_targets
from .dispatch import run_check

SUITE = "msad"

CHECKS = {
    **msad_checkpoints.CHECKS,
    **msad_head.CHECKS,
    **msad_losses.CHECKS,
    **msad_slimmable.CHECKS,
    **msad_steps.CHECKS,
    **msad_targets.CHECKS,
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    run_check(name, load(SUITE, name), CHECKS)

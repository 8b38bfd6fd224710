"""Parity with numbers of the published MSAD code."""

from __future__ import annotations

import pytest

from .cases import case_names, load
from .checks import msad_losses, msad_targets
from .dispatch import run_check

SUITE = "msad"

CHECKS = {**msad_losses.CHECKS, **msad_targets.CHECKS}

PENDING = {
    kind: "MSAD (issue 6)"
    for kind in (
        "channel_tables",
        "detect",
        "fusion",
        "head",
        "kd",
        "parameter_inventory",
        "preprocess",
        "slimmable",
        "toy",
    )
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    run_check(name, load(SUITE, name), CHECKS, PENDING)

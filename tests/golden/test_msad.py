"""Parity with numbers of the published MSAD code."""

from __future__ import annotations

import pytest

from .cases import case_names, load
from .dispatch import run_check

SUITE = "msad"

CHECKS = {}

PENDING = {
    kind: "MSAD (issue 6)"
    for kind in (
        "channel_tables",
        "detect",
        "fusion",
        "head",
        "kd",
        "losses",
        "parameter_inventory",
        "preprocess",
        "slimmable",
        "targets",
        "toy",
    )
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    run_check(name, load(SUITE, name), CHECKS, PENDING)

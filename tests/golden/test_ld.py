"""Parity with numbers of the published localisation distillation code."""

from __future__ import annotations

import pytest

from .cases import Case, case_names, load
from .checks import ld_assigners, ld_detectors, ld_losses, ld_methods, ld_postprocess
from .dispatch import run_check

SUITE = "ld"


def kind_of(case: Case) -> str:
    """Name of the case; for the IoU losses, which are recorded under one name, the class."""
    return case.data["reference"][0].split("::")[1] if case.name.startswith("iouloss") else case.name


CHECKS = {
    **ld_losses.CHECKS,
    **ld_assigners.CHECKS,
    **ld_detectors.CHECKS,
    **ld_postprocess.CHECKS,
    **ld_methods.CHECKS,
}

PENDING = {
    kind: "localisation distillation (issue 3)"
    for kind in (
    )
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    case = load(SUITE, name)
    run_check(kind_of(case), case, CHECKS, PENDING)

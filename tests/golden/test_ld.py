"""Parity with numbers of the published localisation distillation code."""

from __future__ import annotations

import pytest

from .cases import Case, case_names, load
from .checks import ld_assigners, ld_detectors, ld_losses, ld_methods, ld_postprocess
from .dispatch import run_check

SUITE = "ld"
CHECKS = {
    **ld_losses.CHECKS,
    **ld_assigners.CHECKS,
    **ld_detectors.CHECKS,
    **ld_postprocess.CHECKS,
    **ld_methods.CHECKS,
}


def kind_of(case: Case) -> str:
    """Name of the case; for the IoU losses, which are recorded under one name, the class."""
    return case.data["reference"][0].split("::")[1] if case.name.startswith("iouloss") else case.name


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name, tmp_path):
    case = load(SUITE, name, tmp_path)
    run_check(kind_of(case), case, CHECKS)

"""Parity of losses, box coding, alignment and whole steps with numbers of the published CrossKD code."""

from __future__ import annotations

import pytest

from .cases import Case, case_names, load
from .checks import crosskd_heads, crosskd_losses
from .checks.crosskd_losses import loss_name
from .dispatch import run_check

SUITE = "crosskd"
CHECKS = {**crosskd_heads.CHECKS, **crosskd_losses.CHECKS}


def kind_of(case: Case) -> str:
    """The JSON's kind; of losses the class, which tells them apart."""
    return loss_name(case) if case.data["kind"] == "loss" else case.data["kind"]


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    case = load(SUITE, name)
    run_check(kind_of(case), case, CHECKS)

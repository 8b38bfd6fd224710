"""Parity of the Detectron2 in use (real or embedded) with numbers recorded from the real one."""

from __future__ import annotations

import pytest

from .cases import case_names, load
from .checks import (
    d2_config,
    d2_data,
    d2_engine,
    d2_evaluation,
    d2_modeling,
    d2_models,
    d2_solver,
    d2_structures,
    flops,
)
from .dispatch import run_check

SUITE = "detectron2"
CHECKS = {
    **d2_config.CHECKS,
    **d2_data.CHECKS,
    **d2_engine.CHECKS,
    **d2_evaluation.CHECKS,
    **d2_modeling.CHECKS,
    **d2_models.CHECKS,
    **d2_solver.CHECKS,
    **d2_structures.CHECKS,
    **flops.CHECKS,
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name, tmp_path):
    """Cases in a folder are of its kind, the others of that of their names."""
    run_check(name.split("/")[0], load(SUITE, name, tmp_path), CHECKS)

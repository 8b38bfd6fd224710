"""Parity of the Detectron2 in use (real or embedded) with numbers recorded from the real one."""

from __future__ import annotations

import importlib

import pytest

from .cases import case_names, load

SUITE = "detectron2"
MODULES = ("d2_config", "d2_structures", "d2_modeling", "d2_two_stage", "d2_data", "d2_engine",
           "d2_evaluation", "flops")


def _gather(attribute):
    table = {}
    for module in MODULES:
        table.update(getattr(importlib.import_module(f".checks.{module}", __package__), attribute, {}))
    return table


CHECKS, LEFT_OUT = _gather("CHECKS"), _gather("LEFT_OUT")


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name, tmp_path):
    kind = name.split("/")[0]
    if kind in LEFT_OUT and kind not in CHECKS:
        pytest.skip(f"not part of the embedded subset: {LEFT_OUT[kind]}")
    assert kind in CHECKS, f"no check knows golden case {name!r}"
    case = load(SUITE, name)
    CHECKS[kind](case.data, case.arrays, name, tmp_path)

"""Finds the check of a recorded case; a case that nobody knows fails, so that none is skipped unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

import pytest
import torch

from .cases import Case


def run_check(
    kind: str, case: Case, checks: Mapping[str, Callable[[Case], None]], pending: Mapping[str, str]
) -> None:
    """Run the check of the longest key that ``kind`` equals or continues after an underscore."""
    known = [key for key in (*checks, *pending) if kind == key or kind.startswith(key + "_")]
    assert known, f"no check knows golden case {case.name!r} of kind {kind!r}"
    key = max(known, key=len)
    if key in pending:
        pytest.skip(f"not part of the project yet: {pending[key]}")
    checks[key](case)


def assert_recorded(case: Case, key: str, actual: Any) -> None:
    """``actual`` equals the recorded array within the case's tolerance."""
    assert_close(case, key, actual, case.tensor(key))


def assert_recorded_sum(case: Case, key: str, actual: Any) -> None:
    """``actual`` is the sum of the recorded entries, one a level."""
    assert_close(case, key, actual, case.tensor(key).sum())


def assert_close(case: Case, key: str, actual: Any, expected: torch.Tensor) -> None:
    """``actual`` equals ``expected`` within the case's tolerance; ``key`` is for the message."""
    tolerance = case.data["tolerance"]
    actual = torch.as_tensor(actual, dtype=expected.dtype).detach()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
        msg=lambda text: f"{case.name} {key}: {text}",
    )


def assert_recorded_gradient(case: Case, key: str, actual: torch.Tensor) -> None:
    """``actual`` is off by at most a part of the recorded array's largest entry."""
    assert_close_gradient(case, key, actual, case.tensor(key))


def assert_close_gradient(case: Case, key: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """``actual`` is off by at most a part of the largest entry of ``expected``; ``key`` is for the message."""
    tolerance = case.data["tolerance"]
    rtol, atol = (tolerance.get(f"grad_{name}", tolerance[name]) for name in ("rtol", "atol"))
    error = (actual.to(expected.dtype) - expected).abs().max()
    assert error <= rtol * expected.abs().max() + atol, f"{case.name} {key}: off by {error:.3g}"

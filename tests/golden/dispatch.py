"""Finds the check of a recorded case, runs it, and compares with what is recorded.

A case of a kind that no check knows fails, and so does one that has a parameter or an array which its check does
not read, so that nothing goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

import torch

from .cases import Case


def run_check(kind: str, case: Case, checks: Mapping[str, Callable[[Case], None]]) -> None:
    """Run the check of the longest key that ``kind`` equals or continues after an underscore."""
    known = [key for key in checks if kind == key or kind.startswith(key + "_")]
    assert known, f"no check knows golden case {case.name!r} of kind {kind!r}"
    checks[max(known, key=len)](case)
    unread = case.unread()
    assert not unread, f"the check of golden case {case.name!r} reads nothing of: {', '.join(unread)}"


def assert_recorded(case: Case, key: str, actual: Any) -> None:
    """``actual`` equals the recorded array within the case's tolerance."""
    assert_close(case, key, actual, case.tensor(key))


def assert_recorded_sum(case: Case, key: str, actual: Any) -> None:
    """``actual`` is the sum of the recorded entries, one a level."""
    assert_close(case, key, actual, case.tensor(key).sum())


def assert_close(case: Case, key: str, actual: Any, expected: torch.Tensor) -> None:
    """``actual`` equals ``expected`` within the case's tolerance, exactly if that holds integers or booleans."""
    tolerance = {name: float(case.data["tolerance"][name]) for name in ("rtol", "atol")}
    if not isinstance(actual, torch.Tensor):
        actual = torch.as_tensor(actual, dtype=torch.float64)
    actual = actual.detach()
    if expected.dtype.is_floating_point:
        actual = actual.to(expected.dtype)
    else:
        actual, expected, tolerance = actual.double(), expected.double(), {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(
        actual, expected, **tolerance, equal_nan=True, msg=lambda text: f"{case.name} {key}: {text}"
    )


def assert_recorded_gradient(case: Case, key: str, actual: torch.Tensor) -> None:
    """``actual`` is off by at most a part of the recorded array's largest entry."""
    assert_close_gradient(case, key, actual, case.tensor(key))


def assert_close_gradient(case: Case, key: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """``actual`` is off by at most a part of the largest entry of ``expected``; ``key`` is for the message."""
    tolerance = case.data["tolerance"]
    rtol, atol = (tolerance.get(f"grad_{name}", tolerance[name]) for name in ("rtol", "atol"))
    assert actual.shape == expected.shape, f"{case.name} {key}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    error = (actual.to(expected.dtype) - expected).abs().max()
    assert error <= rtol * expected.abs().max() + atol, f"{case.name} {key}: off by {error:.3g}"

"""Weights by iteration, and the sentences for a config that describes none."""

from __future__ import annotations

import pickle

import pytest

from d2_distill.errors import UserError
from d2_distill.methods.schedules import build_schedule, is_constant, is_over


@pytest.mark.parametrize(
    "factor, values",
    [
        (["Warmup", 4], {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 100: 1.0}),
        (["Warmup", 0], {0: 1.0, 1: 1.0}),
        (["EarlyStop", 4], {0: 1.0, 4: 1.0, 5: 0.0}),
        (["Decay", 4], {0: 1.0, 1: 0.75, 4: 0.0, 9: 0.0}),
        (["Linear", 2.0, 6.0, 10, 14], {0: 2.0, 10: 2.0, 11: 3.0, 14: 6.0, 99: 6.0}),
        (["Linear", 2.0, 6.0, 10, 10], {0: 2.0, 9: 2.0, 10: 6.0, 11: 6.0}),
        (["Constant", 0.5], {0: 0.5, 7: 0.5}),
    ],
)
def test_factors(factor, values):
    schedule = build_schedule([factor])
    assert {iteration: schedule(iteration) for iteration in values} == values


def test_factors_multiply_and_none_is_one():
    schedule = build_schedule((("Warmup", 10), ["EarlyStop", 20], ("Constant", 3)))
    assert [schedule(iteration) for iteration in (0, 5, 20, 21)] == [0.0, 1.5, 3.0, 0.0]
    assert build_schedule([])(12345) == 1


@pytest.mark.parametrize("length", [50, 600, 90_000])
def test_parts_of_the_run(length):
    schedule = build_schedule([["Warmup", 0.02], ["EarlyStop", 0.5]], run_length=length)
    assert schedule(0.01 * length) == pytest.approx(0.5) and schedule(0.5 * length) == 1
    assert schedule(length // 2 + 1) == 0 and is_over(schedule, length // 2 + 1)
    whole = build_schedule([["Linear", 0.5, 0.25, 0, 1.0]], run_length=length)
    assert (whole(0), whole(length)) == (0.5, 0.25)  # the values are no iterations
    # Other numbers count iterations, 1 as well.
    assert build_schedule([["Warmup", 1]], run_length=length)(1) == 1
    assert build_schedule([["Warmup", 2000.0]], run_length=length)(1000) == 0.5


@pytest.mark.parametrize(
    "factor, run_length, message",
    [
        (["Warmup", -0.1], 10, "0 or more"),
        (["Warmup", 0.1], None, "a part of a run whose length is not known"),
        (["Linear", 1, 0, 0.9, 0.1], 10, "in ascending order"),
    ],
)
def test_bad_parts(factor, run_length, message):
    with pytest.raises(UserError, match=message):
        build_schedule([factor], run_length=run_length)


def test_only_the_empty_schedule_is_constant():
    assert is_constant(build_schedule([])) and is_constant(build_schedule(()))
    assert not is_constant(build_schedule([["Warmup", 0]])) and not is_constant(lambda iteration: 1.0)


@pytest.mark.parametrize(
    "spec, first",
    [
        ([], None),
        ([["Warmup", 4]], None),
        ([["EarlyStop", 4]], 5),
        ([["EarlyStop", 4.5]], 5),
        ([["EarlyStop", 0]], 1),
        ([["Decay", 4]], 4),
        ([["Decay", 0]], 0),
        ([["Linear", 2.0, 6.0, 3, 9]], None),
        ([["Linear", 0.3, 0.0, 3, 9]], 9),
        ([["Linear", 0.0, 0.3, 3, 9]], None),
        ([["Linear", 0.0, 0.0, 3, 9]], 9),  # it is 0 before, and says so late
        ([["Linear", 0.3, 0.0, 3, 3]], 3),
        ([["Constant", 0.0]], 0),
        ([["Constant", 0.5]], None),
        ([["Warmup", 6], ["EarlyStop", 4]], 5),
        ([["EarlyStop", 9], ["Decay", 7], ["Constant", 2.0], ["Warmup", 3]], 7),
        ([["Linear", 0.0, 1.0, 4, 5], ["EarlyStop", 8]], 9),
    ],
)
def test_when_a_schedule_is_over(spec, first):
    schedule = build_schedule(spec)
    over = [iteration for iteration in range(30) if is_over(schedule, iteration)]
    assert over == ([] if first is None else list(range(first, 30)))
    assert all(schedule(iteration) == 0 for iteration in over)
    if first is None:
        assert schedule(10**9) != 0


def test_other_functions_are_never_over():
    assert not is_over(lambda iteration: 0.0, 10)


def test_a_schedule_can_be_pickled():
    schedule = pickle.loads(pickle.dumps(build_schedule([["Decay", 8]])))
    assert schedule(2) == 0.75 and is_over(schedule, 8)


@pytest.mark.parametrize(
    "spec, part",
    [
        ("Warmup", "KEY is 'Warmup'"),
        (["Warmup", 2000], r"KEY\[0\] is 'Warmup'"),
        ([["Warmup", 5], ["Cosine", 5]], r"KEY\[1\] is \['Cosine', 5\]; the factors are Warmup, EarlyStop"),
        ([["Warmup"]], "takes the numbers length"),
        ([["Warmup", "5"]], "takes the numbers length"),
        ([["EarlyStop", 5, 6]], "takes the numbers last"),
        ([["EarlyStop", True]], "takes the numbers last"),
        ([["Linear", 0.0, 1.0, 9, 5]], "ascending"),
        ([["Decay", -1]], "0 or more"),
        ([[]], r"KEY\[0\] is \[\]"),
        ([[["Warmup"], 3]], "the factors are"),
    ],
)
def test_a_bad_entry_is_named(spec, part):
    with pytest.raises(UserError, match=part):
        build_schedule(spec, key="KEY")

"""When a run is evaluated, and what the evaluation tells those who follow it."""

from __future__ import annotations

import math

import pytest

from d2_distill.engine.evaluation import first_score

from .toy_run import ToyRun


@pytest.mark.parametrize("period, steps", [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (7, [5])])
def test_every_period_and_after_the_last_step(tmp_path, period, steps):
    assert ToyRun(tmp_path, [0.0] * 5, period=period).go().evaluated == steps


def test_resumed_run_makes_up_for_the_evaluation_of_its_checkpoint(tmp_path):
    options = {"period": 2, "checkpoint_period": 2}
    assert ToyRun(tmp_path, [0.0] * 6, **options).go(3).evaluated == [2]
    run = ToyRun(tmp_path, [0.0] * 6, **options, resume=True)
    assert run.go().evaluated == [2, 4, 6]
    assert run.storage.latest()["bbox/AP"] == (0.0, 6)


def test_checkpoint_of_a_step_without_evaluation(tmp_path):
    options = {"period": 2, "checkpoint_period": 3}
    ToyRun(tmp_path, [0.0] * 6, **options).go(4)
    assert ToyRun(tmp_path, [0.0] * 6, **options, resume=True).go().evaluated == [4, 6]


def test_finished_run_is_evaluated_once(tmp_path):
    ToyRun(tmp_path, [0.0] * 4, period=2).go()
    assert ToyRun(tmp_path, [0.0] * 4, period=2, resume=True).go().evaluated == [4]


def test_score_is_that_of_the_first_test_set():
    results = {"a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}}
    assert first_score(results, ["b", "a"]) == 2.0
    assert first_score(results["a"], ["a"]) == first_score(results["a"], ["a", "a"]) == 1.0
    assert first_score({}, []) is None
    assert math.isnan(first_score({}, ["a"]))

"""A run ends when its AP no longer rises, and stays ended."""

from __future__ import annotations

import pytest
import torch

from .toy_run import ToyRun

SCORES = [1.0, 3.0, 2.0, 3.0, 1.0, 9.0, 9.0, 9.0]  # best after step 2; patience 3 ends it after step 5


def state(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def test_ends_after_as_many_evaluations_without_a_better_one(tmp_path):
    run = ToyRun(tmp_path, SCORES, patience=3).go()
    assert run.evaluated == [1, 2, 3, 4, 5]
    assert run.iter == run.max_iter == 5
    final = state(tmp_path)
    assert final["model"]["0"] == 5 and final["iteration"] == final["trainer"]["iteration"] == 4
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_evaluation_that_finds_nothing_is_not_better(tmp_path):
    nan = float("nan")
    assert ToyRun(tmp_path, [nan, nan, 1.0, 1.0], patience=2).go().evaluated == [1, 2]


def test_last_evaluation_changes_nothing(tmp_path):
    run = ToyRun(tmp_path, [1.0, 1.0, 1.0], patience=2).go()
    assert run.evaluated == [1, 2, 3]
    assert state(tmp_path)["iteration"] == 2


def test_resumed_after_its_end_it_does_not_train(tmp_path):
    ToyRun(tmp_path, SCORES, patience=3).go()
    before = (tmp_path / "model_final.pth").read_bytes()
    run = ToyRun(tmp_path, SCORES, patience=3, resume=True).go()
    assert run.evaluated == [5]
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_more_patience_trains_on(tmp_path):
    ToyRun(tmp_path, SCORES, patience=3).go()
    assert ToyRun(tmp_path, SCORES, patience=4, resume=True).go().evaluated == [5, 6, 7, 8]


@pytest.mark.parametrize("killed_after", [2, 3, 4])
@pytest.mark.parametrize("checkpoint_period", [1, 2])
def test_killed_run_ends_at_the_same_step(tmp_path, killed_after, checkpoint_period):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    options = {"patience": 3, "checkpoint_period": checkpoint_period}
    ToyRun(tmp_path / "whole", SCORES, **options).go()
    ToyRun(tmp_path / "parts", SCORES, **options).go(killed_after)
    ToyRun(tmp_path / "parts", SCORES, **options, resume=True).go()
    left, right = state(tmp_path / "parts"), state(tmp_path / "whole")
    assert left == right and left["iteration"] == 4


def test_killed_between_the_checkpoint_and_the_end(tmp_path):
    options = {"patience": 3, "checkpoint_period": 1}
    ToyRun(tmp_path, SCORES, **options).go()
    expected = state(tmp_path)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    run = ToyRun(tmp_path, SCORES, **options, resume=True).go()
    assert run.evaluated == [5]
    assert state(tmp_path) == expected


def test_other_test_set_begins_anew(tmp_path):
    ToyRun(tmp_path, SCORES, patience=3).go()
    run = ToyRun(tmp_path, SCORES, patience=3, resume=True, test_set="other").go()
    assert run.evaluated == [5, 6, 7, 8]

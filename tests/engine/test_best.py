"""model_best.pth has the weights of the highest AP, whatever happens to the run."""

from __future__ import annotations

import pytest
import torch

from d2_distill.errors import UserError

from .toy_run import ToyRun

NAN = float("nan")


def best(folder):
    """The weight in the file and what is recorded with it."""
    state = torch.load(folder / "model_best.pth", weights_only=True)
    return state["model"]["0"].item(), state["best"]["iteration"], state["best"]["value"]


@pytest.mark.parametrize("scores, expected", [
    ([1.0, 3.0, 2.0], (2, 1, 3.0)),
    ([2.0, 2.0, 1.0], (1, 0, 2.0)),  # the first of equal ones
    ([0.0, 1.0, 1.5], (3, 2, 1.5)),  # of the final evaluation
    ([NAN, 0.0, NAN], (2, 1, 0.0)),
])
def test_highest_precision(tmp_path, scores, expected):
    ToyRun(tmp_path, scores).go()
    assert best(tmp_path) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_no_number_no_file(tmp_path):
    ToyRun(tmp_path, [NAN, NAN]).go()
    assert not (tmp_path / "model_best.pth").exists()


def test_last_checkpoint_stays_the_periodic_one(tmp_path):
    ToyRun(tmp_path, [1.0, 2.0, 3.0, 4.0], checkpoint_period=2).go(3)
    assert best(tmp_path)[0] == 3
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("scores", [[3.0, 1.0, 2.0, 2.5], [1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 5.0, 4.0]])
@pytest.mark.parametrize("killed_after", [2, 3])
def test_resumed_run(tmp_path, scores, killed_after):
    """Also with an AP whose iteration is made again, and with one that the checkpoint's state does not know."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    ToyRun(tmp_path / "whole", scores).go()
    ToyRun(tmp_path / "parts", scores, checkpoint_period=2).go(killed_after)
    ToyRun(tmp_path / "parts", scores, checkpoint_period=2, resume=True).go()
    names = [tmp_path / name / "model_best.pth" for name in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_other_test_set_begins_anew(tmp_path):
    ToyRun(tmp_path, [9.0, 9.0, 1.0, 2.0], checkpoint_period=2).go(2)
    ToyRun(tmp_path, [9.0, 0.5, 1.0, 2.0], checkpoint_period=2, resume=True, test_set="other").go()
    assert best(tmp_path) == (4, 3, 2.0)


def test_file_of_another_run_does_not_count(tmp_path):
    ToyRun(tmp_path, [9.0]).go()
    (tmp_path / "last_checkpoint").unlink()
    ToyRun(tmp_path, [1.0, 2.0]).go()
    assert best(tmp_path) == (2, 1, 2.0)


def test_damaged_file(tmp_path):
    ToyRun(tmp_path, [1.0, 2.0, 3.0], checkpoint_period=2).go(2)
    (tmp_path / "model_best.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="OUTPUT_DIR: .*model_best.pth cannot be read as a checkpoint"):
        ToyRun(tmp_path, [1.0, 2.0, 3.0], checkpoint_period=2, resume=True).go()

"""Checkpoints that must fit: each way of not fitting has a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.checkpoint.exact import load_exactly
from d2_distill.errors import UserError

KEY = "MODEL.WEIGHTS"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def save(path, change=lambda state: None) -> str:
    state = model().state_dict()
    change(state)
    torch.save({"model": state, "iteration": 3}, path)
    return str(path)


def test_everything_is_loaded(tmp_path):
    weights, target = save(tmp_path / "a.pth"), model()
    load_exactly(target, weights, key=KEY)
    saved = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in target.state_dict().items())


def rename(state):
    state["0.kernel"] = state.pop("0.weight")


def reshape(state):
    state["0.weight"] = torch.zeros(4, 2)
    state["1.running_var"] = torch.zeros(9)


@pytest.mark.parametrize(
    "change, listing",
    [
        (rename, "(1 missing: 0.weight; 1 unexpected: 0.kernel)"),
        (reshape, "(2 mis-shaped: 0.weight (4, 2) (model: (3, 2)), 1.running_var (9,) (model: (3,)))"),
        (lambda state: state.clear(), "6 missing: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean"),
    ],
)
def test_keys_that_do_not_fit_are_listed(tmp_path, change, listing):
    weights = save(tmp_path / "a.pth", change)
    with pytest.raises(UserError) as error:
        load_exactly(model(), weights, key=KEY)
    message = str(error.value)
    assert message.startswith(f"{KEY}: {weights} does not fit") and listing in message


@pytest.mark.parametrize("weights", ["", "absent.pth", "absent.pth?matching_heuristics=True"])
def test_no_file(weights):
    expected = "is empty" if not weights else "there is no file absent.pth"
    with pytest.raises(UserError, match=f"{KEY}.* {expected}"):
        load_exactly(model(), weights, key=KEY)


def test_no_connection():
    """Nobody listens at port 9."""
    with pytest.raises(UserError, match=rf"{KEY}: http:\S* cannot be read .*; download it elsewhere and name the file"):
        load_exactly(model(), "http://127.0.0.1:9/model.pth", key=KEY)


def test_folder(tmp_path):
    with pytest.raises(UserError, match=rf"{KEY}: {tmp_path} is a folder; name the checkpoint in it, such as"):
        load_exactly(model(), str(tmp_path), key=KEY)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"{KEY}: .*a.pth cannot be read as a checkpoint \(") as error:
        load_exactly(model(), str(tmp_path / "a.pth"), key=KEY)
    assert "\n" not in str(error.value)

"""The moving average of the weights: its formula, what it holds, and which checkpoint has it as its model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.averaging import AveragingCheckpointer, WeightAverage, check_averaging
from d2_distill.errors import UserError


class Model(nn.Module):
    """A weight, a frozen weight, a batch norm and a buffer of constants."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = nn.Parameter(torch.tensor([0.1]), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("pixel_mean", torch.tensor([103.53]))


@pytest.fixture
def started():
    model = Model()
    average = WeightAverage(model, 0.5)
    average.start()
    return model, average


def set_all(model, value):
    with torch.no_grad():
        model.weight.fill_(value)
        model.norm.running_mean.fill_(value)
        model.norm.num_batches_tracked += 1


def held(model, average):
    with average.in_place():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_formula(started):
    model, average = started
    expected, mean = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.0
    for iteration, value in enumerate([4.0, 8.0, 5.0, 1.0, 3.0, 2.0, 7.0, 9.0, 6.0, 5.0, 4.0, 3.0]):
        set_all(model, value)
        average.update(iteration)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        expected, mean = decay * expected + (1 - decay) * value, decay * mean + (1 - decay) * value
    assert iteration > 8  # from there on the decay is the configured one
    found = held(model, average)
    torch.testing.assert_close(found["weight"].double(), expected)
    torch.testing.assert_close(found["norm.running_mean"].double(), torch.full((2,), mean, dtype=torch.float64))


def test_what_does_not_change_stays_to_the_bit_and_counters_are_copied(started):
    model, average = started
    for iteration in range(50):
        set_all(model, iteration)
        average.update(iteration)
    found = held(model, average)
    for name in ("frozen", "pixel_mean", "norm.weight"):
        assert found[name].equal(model.state_dict()[name])
    assert found["norm.num_batches_tracked"] == 50


def test_trained_weights_come_back(started):
    model, average = started
    set_all(model, 7.0)
    average.update(0)
    with pytest.raises(RuntimeError), average.in_place():
        assert not model.weight.equal(torch.full((2,), 7.0))
        raise RuntimeError
    assert model.weight.equal(torch.full((2,), 7.0)) and model.weight.requires_grad


@pytest.mark.parametrize("name", ["model_0000000", "model_final"])
def test_checkpoint_holds_both(started, tmp_path, name):
    model, average = started
    set_all(model, 7.0)
    average.update(0)
    AveragingCheckpointer(model, str(tmp_path), average=average).save(name)
    of_average = held(model, average)
    is_final = name == "model_final"
    state = torch.load(tmp_path / f"{name}.pth", weights_only=True)
    assert state["model"]["weight"].equal(of_average["weight"] if is_final else model.weight)

    other = Model()
    average_of_other = WeightAverage(other, 0.5)
    AveragingCheckpointer(other, str(tmp_path), average=average_of_other).load(str(tmp_path / f"{name}.pth"))
    average_of_other.start()  # changes nothing that was loaded
    for found, expected in ((other.state_dict(), model.state_dict()), (held(other, average_of_other), of_average)):
        assert found.keys() == expected.keys()
        assert all(found[key].equal(expected[key]) for key in expected)


def config(*opts):
    cfg = get_distill_cfg()
    cfg.merge_from_list(["SOLVER.EMA.ENABLED", True, *opts])
    return cfg


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5])
def test_bad_decay(decay):
    with pytest.raises(UserError, match=f"SOLVER.EMA.DECAY is {decay}; set it"):
        check_averaging(config("SOLVER.EMA.DECAY", decay))
    check_averaging(config("SOLVER.EMA.DECAY", decay, "SOLVER.EMA.ENABLED", False))


def test_precise_bn_is_refused():
    with pytest.raises(UserError, match="TEST.PRECISE_BN.ENABLED recomputes .* SOLVER.EMA.ENABLED"):
        check_averaging(config("TEST.PRECISE_BN.ENABLED", True))
    check_averaging(config())

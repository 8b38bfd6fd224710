"""The hooks of the training loop, on a model of one number."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

from .toy_training import simple_trainer


def test_steps_are_timed_from_the_third_on():
    trainer = simple_trainer()
    trainer.register_hooks([hooks.IterationTimer()])
    trainer.train(5, 9)
    times = trainer.storage.history("time").values()
    assert [iteration for _, iteration in times] == [7, 8]
    assert all(seconds > 0 for seconds, _ in times)


def test_writers_write_periodically_at_the_last_step_and_at_the_end():
    class Writer(EventWriter):
        def __init__(self):
            self.iterations, self.closed = [], False

        def write(self):
            self.iterations.append(get_event_storage().iter)

        def close(self):
            self.closed = True

    writer = Writer()
    trainer = simple_trainer()
    trainer.register_hooks([hooks.PeriodicWriter([writer], period=3)])
    trainer.train(0, 7)
    assert writer.iterations == [2, 5, 6, 7] and writer.closed


def test_the_learning_rate_is_that_of_the_step_in_the_largest_group():
    model = nn.Linear(1, 1)
    extra = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [extra], "lr": 5.0}, {"params": model.parameters()}], lr=1.0)
    trainer = SimpleTrainer(model, [torch.ones(1, 1)] * 3, optimizer)
    trainer.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    trainer.register_hooks([hooks.LRScheduler()])
    model.forward = lambda x: {"loss": (model.weight * x).sum()}
    trainer.train(0, 3)
    assert [lr for lr, _ in trainer.storage.history("lr").values()] == pytest.approx([1, 0.1, 0.01])


def _evaluated_at(period, steps, fail_at=None):
    """Iterations at which EvalHook evaluated a run of so many steps, and the trainer."""
    seen = []
    trainer = simple_trainer(data=[math.nan if step == fail_at else 1.0 for step in range(steps)])

    def evaluate():
        seen.append(get_event_storage().iter)
        return {"bbox": {"AP": 10.0 * len(seen), "AP50": 1}}

    trainer.register_hooks([hooks.EvalHook(period, evaluate)])
    if fail_at is None:
        trainer.train(0, steps)
    else:
        with pytest.raises(FloatingPointError):
            trainer.train(0, steps)
    return seen, trainer


def test_evaluation_is_periodic_and_once_at_the_end():
    seen, trainer = _evaluated_at(period=2, steps=6)
    assert seen == [1, 3, 6]
    assert trainer.storage.history("bbox/AP").values() == [(10.0, 1), (20.0, 3), (30.0, 6)]
    assert trainer.storage.latest()["bbox/AP50"] == (1.0, 6)
    assert _evaluated_at(period=0, steps=3)[0] == [3]


def test_a_failed_run_is_not_evaluated_at_the_end():
    assert _evaluated_at(period=0, steps=4, fail_at=2)[0] == []

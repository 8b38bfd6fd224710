"""A step in parts is the step of the whole batch where losses are means over images."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.accumulation import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    build_stepper,
    check_accumulation,
)
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.errors import UserError

CLIPPING = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model",
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.05]


def config(*opts):
    cfg = get_distill_cfg()
    cfg.merge_from_list(opts)
    return cfg


class MeanOverImages(nn.Module):
    """Two losses that are means over images; it counts how many images come at once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        out = self.layer(torch.stack(images))
        return {"loss_a": out.square().mean(), "loss_b": out.abs().mean()}


def batches(count=4, size=8):
    generator = torch.Generator().manual_seed(0)
    return [list(torch.randn(size, 3, generator=generator)) for _ in range(count)]


def train(model, parts, *opts, steps=4):
    cfg = config("SOLVER.ACCUMULATION_STEPS", parts, "SOLVER.BASE_LR", 0.1, *opts)
    trainer = build_stepper(cfg, model, build_optimizer(cfg, model))
    trainer.data_loader = batches()
    trainer.train(0, steps)
    return trainer


@pytest.mark.parametrize("opts", [[], CLIPPING, ["SOLVER.OPTIMIZER", "AdamW"]], ids=["SGD", "clipped", "AdamW"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_step_equals_that_of_the_whole_batch(parts, opts):
    torch.manual_seed(0)
    whole = MeanOverImages()
    start = whole.layer.weight.clone()
    in_parts = copy.deepcopy(whole)
    expected, found = train(whole, 1, *opts), train(in_parts, parts, *opts)
    assert whole.sizes == [8] * 4 and in_parts.sizes == [8 // parts] * 4 * parts
    assert not torch.allclose(start, whole.layer.weight)
    for ours, theirs in zip(in_parts.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in ("loss_a", "loss_b", "total_loss"):
        value, iteration = found.storage.latest()[name]
        assert (value, iteration) == (pytest.approx(expected.storage.latest()[name][0], rel=1e-5), 3)


def test_iteration_is_that_of_the_step_in_every_part():
    seen = []

    class Watched(MeanOverImages):
        def forward(self, images):
            seen.append(trainer.storage.iter)
            return super().forward(images)

    model = Watched()
    trainer = AccumulatingTrainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1), parts=2)
    trainer.train(0, 3)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_loss_that_is_not_finite_stops_before_the_update():
    class Broken(MeanOverImages):
        def forward(self, images):
            losses = super().forward(images)
            return {**losses, "loss_c": losses["loss_a"] * float("nan")} if len(self.sizes) == 1 else losses

    model = Broken()
    before = model.layer.weight.clone()
    with pytest.raises(FloatingPointError):
        train(model, 2)
    assert model.layer.weight.equal(before)


def test_processes_exchange_gradients_once_a_step(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(MeanOverImages())
        exchanges = []

        def count(state, bucket):
            exchanges.append(bucket.is_last())
            return torch.futures.collect_all([]).then(lambda _: bucket.buffer())

        model.register_comm_hook(None, count)
        train(model, 4, steps=3)
        assert sum(exchanges) == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("parts, expected", [(1, SimpleTrainer), (3, AccumulatingTrainer)])
def test_one_part_is_detectron2_s_own_trainer(parts, expected):
    model = MeanOverImages()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert type(build_stepper(config("SOLVER.ACCUMULATION_STEPS", parts), model, optimizer)) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mixed precision needs a GPU")
def test_mixed_precision():
    torch.manual_seed(0)
    whole = MeanOverImages().cuda()
    in_parts = copy.deepcopy(whole)

    def on_gpu(model, parts):
        cfg = config("SOLVER.ACCUMULATION_STEPS", parts, "SOLVER.AMP.ENABLED", True, *CLIPPING)
        trainer = build_stepper(cfg, model, build_optimizer(cfg, model))
        trainer.data_loader = [[image.cuda() for image in batch] for batch in batches()]
        trainer.train(0, 4)
        return trainer

    on_gpu(whole, 1)
    assert isinstance(on_gpu(in_parts, 4), AccumulatingAMPTrainer)
    for ours, theirs in zip(in_parts.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_gradients_are_scaled_before_they_are_summed_and_unscaled_once(monkeypatch):
    """The parts of mixed precision that are not arithmetic, on the CPU."""
    monkeypatch.setattr(AMPTrainer, "__init__", SimpleTrainer.__init__)  # it needs a GPU
    monkeypatch.setattr(AccumulatingAMPTrainer, "_precision", AccumulatingTrainer._precision)
    torch.manual_seed(0)
    whole = MeanOverImages()
    in_parts = copy.deepcopy(whole)
    train(whole, 1, steps=2)
    cfg = config("SOLVER.ACCUMULATION_STEPS", 4, "SOLVER.BASE_LR", 0.1, "SOLVER.AMP.ENABLED", True)
    trainer = build_stepper(cfg, in_parts, build_optimizer(cfg, in_parts))
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.data_loader = batches()
    trainer.train(0, 2)
    assert trainer.grad_scaler.get_scale() == 1024.0
    torch.testing.assert_close(in_parts.layer.weight, whole.layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opts, processes, sentence", [
    (["SOLVER.ACCUMULATION_STEPS", 0], 1, "SOLVER.ACCUMULATION_STEPS is 0; set it"),
    (["SOLVER.ACCUMULATION_STEPS", 3], 1, "SOLVER.IMS_PER_BATCH is 16, which 1 process cannot .* a multiple of 3"),
    (["SOLVER.ACCUMULATION_STEPS", 8], 4, "which 4 processes cannot .* make it a multiple of 32"),
    (["SOLVER.ACCUMULATION_STEPS", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4], 1, "which 4 processes cannot"),
])
def test_batches_that_cannot_be_divided(monkeypatch, opts, processes, sentence):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    with pytest.raises(UserError, match=sentence):
        check_accumulation(config(*opts))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_batches_that_can_be_divided(monkeypatch, parts):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    check_accumulation(config("SOLVER.ACCUMULATION_STEPS", parts))

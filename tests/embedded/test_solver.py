"""Parameter groups, gradient clipping and schedules beyond what the recorded numbers show."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import (
    LRMultiplier,
    WarmupParamScheduler,
    build_lr_scheduler,
    build_optimizer,
    get_default_optimizer_params,
)
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn

from d2_distill import provider


def make_config(*opts):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (8,), *opts])
    return cfg


def make_sgd(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def run_schedule(cfg, steps):
    optimizer = make_sgd(cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


class TestParameterGroups:
    def make_model(self):
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1))

    def by_parameter(self, groups):
        return {p: {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]}

    def test_bias_wins_over_norm(self):
        model = self.make_model()
        hyper = self.by_parameter(
            get_default_optimizer_params(
                model, base_lr=1.0, weight_decay_norm=0.25, bias_lr_factor=2.0, weight_decay_bias=0.125)
        )
        assert hyper[model[0].weight] == {"lr": 1.0}
        assert hyper[model[1].weight] == {"lr": 1.0, "weight_decay": 0.25}
        assert hyper[model[1].bias] == hyper[model[2].bias] == {"lr": 2.0, "weight_decay": 0.125}

    def test_frozen_parameters_are_left_out_and_shared_ones_come_once(self):
        shared = nn.Linear(1, 1)
        frozen = nn.Linear(1, 1).requires_grad_(False)
        model = nn.ModuleList([shared, frozen, nn.Sequential(shared)])
        (group,) = get_default_optimizer_params(model, base_lr=1.0)
        assert [id(p) for p in group["params"]] == [id(shared.weight), id(shared.bias)]

    def test_solver_keys_reach_sgd(self):
        cfg = make_config("SOLVER.MOMENTUM", 0.75, "SOLVER.NESTEROV", True, "SOLVER.WEIGHT_DECAY", 0.5)
        optimizer = build_optimizer(cfg, self.make_model())
        assert type(optimizer) is torch.optim.SGD
        plain, norm = optimizer.param_groups
        assert (plain["momentum"], plain["nesterov"], plain["weight_decay"]) == (0.75, True, 0.5)
        assert (norm["weight_decay"], len(norm["params"])) == (0.0, 2)


class TestGradientClipping:
    def test_disabled_gives_the_same_object(self):
        assert maybe_add_gradient_clipping(make_config(), torch.optim.AdamW) is torch.optim.AdamW

    def test_any_optimizer_class_can_clip(self):
        cfg = make_config("SOLVER.CLIP_GRADIENTS.ENABLED", True)
        clipping = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        assert issubclass(clipping, torch.optim.AdamW) and clipping.__name__ == "AdamWWithGradientClip"

    def test_each_parameter_by_its_own_maximum_norm(self):
        cfg = make_config(
            "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm",
            "SOLVER.CLIP_GRADIENTS.NORM_TYPE", math.inf, "SOLVER.WEIGHT_DECAY", 0.0,
        )
        model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(3)])
        optimizer = build_optimizer(cfg, model)
        model[0].grad, model[1].grad = torch.tensor([3.0, -6.0]), torch.tensor([0.25, 0.5])
        optimizer.step()
        torch.testing.assert_close(model[0].data, torch.tensor([-0.5, 1.0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(model[1].data, torch.tensor([-0.25, -0.5]))
        assert model[2].grad is None and not model[2].any()


class TestSchedules:
    def test_equal_steps_with_a_fixed_gamma(self):
        opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.NUM_DECAYS", 1,
                "SOLVER.GAMMA", 0.5, "SOLVER.WARMUP_ITERS", 0)
        assert run_schedule(make_config(*opts), steps=9) == [1.0] * 5 + [0.5] * 5

    @pytest.mark.skipif(provider.name() == "real", reason="Detectron2 raises IndexError at the last step")
    def test_fixed_gamma_survives_the_last_step(self):
        opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.WARMUP_ITERS", 0)
        rates = run_schedule(make_config(*opts), steps=10)
        assert rates[-1] == rates[-2] == pytest.approx(1e-3)

    def test_warm_up_longer_than_training_is_cut(self):
        cfg = make_config("SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 1000, "SOLVER.WARMUP_FACTOR", 0.5)
        assert run_schedule(cfg, steps=9) == pytest.approx([0.5 + 0.05 * i for i in range(10)])

    def test_linear_warm_up_meets_the_schedule(self):
        schedule = CosineParamScheduler(1.0, 0.0)
        warmup = WarmupParamScheduler(schedule, 0.1, 0.25)
        assert [warmup(0.0), warmup(0.125)] == pytest.approx([0.1, 0.05 + 0.5 * schedule(0.25)])
        assert warmup(0.5) == pytest.approx(schedule(0.5))

    def test_rescaled_schedule_starts_after_the_warm_up(self):
        schedule = LinearParamScheduler(1.0, 0.0)
        warmup = WarmupParamScheduler(schedule, 0.1, 0.5, "constant", rescale_interval=True)
        assert [warmup(0.25), warmup(0.75)] == pytest.approx([0.1, 0.5])

    @pytest.mark.parametrize(
        "opts, error",
        [
            (("SOLVER.LR_SCHEDULER_NAME", "NoSuchLR"), ValueError),
            (("SOLVER.WARMUP_METHOD", "sudden"), ValueError),
            (("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 2.0), AssertionError),
        ],
    )
    def test_unknown_settings_are_refused(self, opts, error):
        with pytest.raises(error):
            build_lr_scheduler(make_config(*opts), make_sgd())

    def test_groups_keep_their_ratio(self):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 4.0)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        scheduler = build_lr_scheduler(make_config("SOLVER.WARMUP_ITERS", 4), optimizer)
        optimizer.step()
        scheduler.step()
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(4 * first) and first < 1.0

    def test_resuming_restores_the_progress_but_not_the_schedule(self):
        optimizer = make_sgd()
        scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), max_iter=10)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        state = scheduler.state_dict()
        assert state == {"base_lrs": [1.0], "last_epoch": 4}
        resumed = make_sgd()
        other = LRMultiplier(resumed, ConstantParamScheduler(0.25), max_iter=10)
        other.load_state_dict(state)
        resumed.step()
        other.step()
        assert other.last_epoch == 5 and resumed.param_groups[0]["lr"] == 0.25

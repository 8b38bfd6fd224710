"""Solver: learning-rate schedules, parameter groups, gradient clipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn

from ..cases import Case
from ..recording import plain

RETINANET = Path(__file__).parents[3] / "configs/baselines/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SMALL_RETINANET = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32,
]


def _config(opts, base_config=None):
    cfg = get_cfg()
    if base_config is not None:
        cfg.merge_from_file(str(base_config))
    cfg.merge_from_list(opts)
    return cfg


def check_lr_schedules(case: Case) -> None:
    for entry in case.data["cases"]:
        cfg = _config(plain(entry["opts"]))
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler = build_lr_scheduler(cfg, optimizer)
        rates, iterations = [], list(entry["iterations"])
        for _ in range(iterations[-1] + 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        recorded = pytest.approx(list(entry["lr_before_step"]), rel=1e-7)
        assert [rates[i] for i in iterations] == recorded, entry["opts"]


def check_optimizer_groups(case: Case) -> None:
    for entry in case.data["cases"]:
        cfg = _config(SMALL_RETINANET + plain(entry["opts"]), RETINANET)
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        assert type(optimizer).__name__ == entry["class"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        assert len(optimizer.param_groups) == len(entry["groups"])
        for group, expected in zip(optimizer.param_groups, entry["groups"]):
            parameters = group["params"]
            assert {
                "n": len(parameters),
                "first": names[parameters[0]],
                "last": names[parameters[-1]],
                **{key: group[key] for key in ("lr", "weight_decay", "momentum", "nesterov")},
            } == expected


def check_grad_clip(case: Case) -> None:
    for entry in case.data["cases"]:
        layer = nn.Linear(2, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        w0, w1, b = entry["grads_w0_w1_b"]
        layer.weight.grad, layer.bias.grad = torch.tensor([[w0, w1]]), torch.tensor([b])
        build_optimizer(_config(["SOLVER.BASE_LR", 1.0] + plain(entry["opts"])), layer).step()
        after = torch.cat([layer.weight.flatten(), layer.bias]).tolist()
        assert after == pytest.approx(list(entry["params_after_step"]), rel=1e-6), entry["opts"]


CHECKS = {
    "lr_schedules": check_lr_schedules,
    "optimizer_groups": check_optimizer_groups,
    "grad_clip": check_grad_clip,
}

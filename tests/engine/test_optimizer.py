"""What the project's optimisers add to Detectron2's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.errors import UserError


def config(*opts):
    cfg = get_distill_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, *opts])
    cfg.freeze()
    return cfg


def clipping(clip_type: str, value: float):
    node = "SOLVER.CLIP_GRADIENTS."
    return [node + "ENABLED", True, node + "CLIP_TYPE", clip_type, node + "CLIP_VALUE", value]


def layer_with_gradients(scale: float = 1.0) -> nn.Linear:
    """Of norms 3 (weight) and 4 (bias), 5 together, times ``scale``; a frozen parameter beside them."""
    model = nn.Linear(1, 2)
    model.weight.grad = torch.tensor([[0.0], [3.0]]) * scale
    model.bias.grad = torch.tensor([4.0, 0.0]) * scale
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    return model


def step_of(model: nn.Module, *opts):
    """How far an SGD step of rate 1 moves weight and bias."""
    before = [model.weight.clone(), model.bias.clone()]
    build_optimizer(config(*opts), model).step()
    return [(old - new).flatten().tolist() for old, new in zip(before, (model.weight, model.bias))]


def approx(*rows):
    return [pytest.approx(list(row), abs=1e-5) for row in rows]


def test_clipping_of_all_gradients_together():
    # 5 becomes 2.5, and the gradients keep their ratio; each alone would be 2.5 and 2.5.
    assert step_of(layer_with_gradients(), *clipping("full_model", 2.5)) == approx([0, 1.5], [2, 0])
    assert step_of(layer_with_gradients(), *clipping("norm", 2.5)) == approx([0, 2.5], [2.5, 0])
    maximum = [*clipping("full_model", 2.0), "SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf")]
    assert step_of(layer_with_gradients(), *maximum) == approx([0, 1.5], [2, 0])


def test_small_gradients_are_not_clipped():
    assert step_of(layer_with_gradients(), *clipping("full_model", 35.0)) == approx([0, 3], [4, 0])
    off = [*clipping("full_model", 0.1), "SOLVER.CLIP_GRADIENTS.ENABLED", False]
    assert step_of(layer_with_gradients(), *off) == approx([0, 3], [4, 0])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipping_works_with_any_optimizer(name):
    """Clipped gradients make the same step whatever their size was."""
    opts = ["SOLVER.OPTIMIZER", name, *clipping("full_model", 1.0)]
    once, larger = (step_of(layer_with_gradients(scale), *opts) for scale in (1.0, 100.0))
    assert once == [pytest.approx(row, abs=1e-5) for row in larger]
    model = layer_with_gradients()
    build_optimizer(config(*opts), model).step()
    assert sum(p.grad.square().sum() for p in (model.weight, model.bias)) == pytest.approx(1, abs=1e-4)


def test_unknown_optimizer():
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER is 'Adam'; choose SGD or AdamW"):
        build_optimizer(config("SOLVER.OPTIMIZER", "Adam"), nn.Linear(1, 1))

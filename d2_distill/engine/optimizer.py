"""Optimisers by name, with Detectron2's parameter groups and gradient clipping."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from ..errors import UserError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``SOLVER.OPTIMIZER`` over the trainable parameters.

    Raises:
        UserError: the name is unknown.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    if solver.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose SGD or AdamW.")

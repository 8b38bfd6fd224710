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

    Where ``SOLVER.CLIP_GRADIENTS`` clips, its CLIP_TYPE may also be "full_model": the norm of all gradients
    together, not of each parameter's alone as with Detectron2's "norm".

    Raises:
        UserError: the name is unknown.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if not clipping.ENABLED or clipping.CLIP_TYPE != "full_model":
        return _build_by_name(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # Detectron2 does not know this type
    optimizer = _build_by_name(cfg, model)

    def clip(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clipping.CLIP_VALUE, clipping.NORM_TYPE)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def _build_by_name(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
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

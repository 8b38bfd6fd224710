"""Optimizers (parameter groups, gradient clipping) and learning-rate schedulers from a config."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .lr_scheduler import LRMultiplier, WarmupParamScheduler

_NORM_LAYERS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD over the model's trainable parameters, as the SOLVER keys say."""
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model, base_lr=solver.BASE_LR, weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR, weight_decay_bias=solver.WEIGHT_DECAY_BIAS)
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
        params, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY, foreach=True)


def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: type[Optimizer]) -> type[Optimizer]:
    """The class as it is, or its subclass ``<Name>WithGradientClip``, which clips before every step.

    Each parameter's gradient is clipped alone, by value or by norm.
    """
    options = cfg.SOLVER.CLIP_GRADIENTS
    if not options.ENABLED:
        return optimizer
    if options.CLIP_TYPE not in ("value", "norm"):
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {options.CLIP_TYPE!r}; use 'value' or 'norm'.")
    by_norm, limit, norm_type = options.CLIP_TYPE == "norm", options.CLIP_VALUE, options.NORM_TYPE

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if by_norm:
                    nn.utils.clip_grad_norm_(parameter, limit, norm_type)
                else:
                    nn.utils.clip_grad_value_(parameter, limit)
        return super(clipping_class, self).step(closure)

    clipping_class = type(f"{optimizer.__name__}WithGradientClip", (optimizer,), {"step": step})
    return clipping_class


def get_default_optimizer_params(
    model: nn.Module, *, base_lr: float, weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0, weight_decay_bias: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer; what is None is left to the optimizer's defaults.

    Parameters of equal settings share a group: the fewer groups, the faster a multi-tensor step.

    Args:
        weight_decay_norm: for the parameters of normalisation layers.
        bias_lr_factor, weight_decay_bias: for parameters called ``bias`` (these win over the norm's).
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr = base_lr
            weight_decay = weight_decay_norm if isinstance(module, _NORM_LAYERS) else None
            if name == "bias":
                lr = base_lr * (1.0 if bias_lr_factor is None else bias_lr_factor)
                weight_decay = weight_decay if weight_decay_bias is None else weight_decay_bias
            groups[lr, weight_decay].append(parameter)
    return [
        {"params": parameters, "lr": lr, **({} if weight_decay is None else {"weight_decay": weight_decay})}
        for (lr, weight_decay), parameters in groups.items()
    ]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """The scheduler called SOLVER.LR_SCHEDULER_NAME, with warm-up; it is stepped once an iteration."""
    solver = cfg.SOLVER
    warmup_length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    multiplier = WarmupParamScheduler(
        _build_multiplier(solver), solver.WARMUP_FACTOR, warmup_length, solver.WARMUP_METHOD,
        rescale_interval=solver.RESCALE_INTERVAL)
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def _build_multiplier(solver: CfgNode) -> ParamScheduler:
    name = solver.LR_SCHEDULER_NAME
    if name == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        if len(steps) != len(solver.STEPS):
            logging.getLogger(__name__).warning(
                "SOLVER.STEPS %s after SOLVER.MAX_ITER %s are ignored.", solver.STEPS, solver.MAX_ITER)
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, num_updates=solver.MAX_ITER, milestones=steps)
    if name == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        assert 0.0 <= end <= 1.0, "SOLVER.BASE_LR_END must be between 0 and SOLVER.BASE_LR."
        return CosineParamScheduler(1.0, end)
    if name == "WarmupStepWithFixedGammaLR":
        return StepWithFixedGammaParamScheduler(
            base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=solver.MAX_ITER)
    raise ValueError(f"SOLVER.LR_SCHEDULER_NAME {name!r} is not known.")

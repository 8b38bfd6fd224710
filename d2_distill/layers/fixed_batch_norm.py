"""Batch norms exchanged in a built model: fixed statistics, as OpenMMLab's backbones have them; SyncBN on the CPU."""

from __future__ import annotations

import logging
from typing import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ..errors import UserError

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises with its running statistics, also in training, and never updates them.

    Weight and bias are trained, unlike FrozenBatchNorm2d's: OpenMMLab's ``norm_eval=True`` with
    ``requires_grad=True``. The state dict is BatchNorm2d's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d and SyncBatchNorm below ``module`` in place.

        Parameters and buffers are taken over, not copied. FrozenBatchNorm2d is left alone.

        Returns:
            ``module``, or its replacement if it is itself a batch norm.
        """
        return _replace(module, BATCH_NORMS, _taking_over(cls))


class _ThenActivation:
    """A batch norm with a dropout and an activation in it, as many networks of timm have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class _FixedAndActivation(_ThenActivation, FixedBatchNorm2d):
    pass


class _FrozenAndActivation(_ThenActivation, FrozenBatchNorm2d):
    pass


class _SyncAndActivation(_ThenActivation, nn.SyncBatchNorm):
    pass


class _BatchNormAndActivation(_ThenActivation, nn.BatchNorm2d):
    pass


_WITH_ACTIVATION = {
    FixedBatchNorm2d: _FixedAndActivation,
    FrozenBatchNorm2d: _FrozenAndActivation,
    nn.SyncBatchNorm: _SyncAndActivation,
    nn.BatchNorm2d: _BatchNormAndActivation,
}


def _replace(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Exchange the batch norms of these kinds for what is made of them, in place; activations in them stay."""
    if isinstance(module, kinds):
        norm = make(module)
        if hasattr(module, "act"):
            norm.__class__ = _WITH_ACTIVATION[type(norm)]
            norm.drop, norm.act = module.drop, module.act
        return norm
    for name, child in module.named_children():
        setattr(module, name, _replace(child, kinds, make))
    return module


def _taking_over(norm_class: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a norm of this class with the parameters and buffers of another."""

    def make(module: nn.Module) -> nn.Module:
        norm = norm_class(module.num_features, eps=module.eps, momentum=module.momentum, affine=module.affine)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            setattr(norm, name, tensor)
        return norm.train(module.training)

    return make


def has_batch_norms(module: nn.Module) -> bool:
    return any(isinstance(each, BATCH_NORMS) for each in module.modules())


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """Return the module with FrozenBatchNorm2d in the place of its batch norms, in place if it is none itself."""
    return _replace(module, BATCH_NORMS, FrozenBatchNorm2d.convert_frozen_batchnorm)


def synchronise(module: nn.Module) -> nn.Module:
    """Return the module with SyncBN in the place of its batch norms, in place if it is none itself."""
    return _replace(module, (nn.BatchNorm2d,), _taking_over(nn.SyncBatchNorm))


def fix_statistics(backbone: nn.Module) -> None:
    """Convert the batch norms of a backbone, in place, but for those of a pyramid, which start untrained.

    Raises:
        UserError: there are none.
    """
    # Detectron2's FPN calls what it stands on "bottom_up".
    bottom_up = FixedBatchNorm2d.convert(getattr(backbone, "bottom_up", backbone))
    if not any(isinstance(module, FixedBatchNorm2d) for module in bottom_up.modules()):
        raise UserError(
            "MODEL.BACKBONE.FIXED_BN_STATISTICS is True, but the backbone has no batch norm that is trained; "
            'set its NORM (MODEL.RESNETS.NORM, MODEL.MOBILENETV2.NORM, MODEL.SLIMMABLE.NORM or MODEL.TIMM.NORM) to '
            '"BN" and MODEL.BACKBONE.FREEZE_AT below 5, or leave the key out.'
        )


def unsynchronise(model: nn.Module) -> None:
    """Convert SyncBN, which several processes can share on GPUs only, to batch norm, in place."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        _replace(model, (nn.SyncBatchNorm,), _taking_over(nn.BatchNorm2d))
        logger.info("MODEL.DEVICE is a CPU: SyncBN is batch norm, with the statistics of each process alone.")

"""Batch norms exchanged in a built model: fixed statistics, as OpenMMLab's backbones have them; SyncBN on the CPU."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError

logger = logging.getLogger(__name__)


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
        return _replace(module, (nn.BatchNorm2d, nn.SyncBatchNorm), cls)


def _replace(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], norm_class: type[nn.BatchNorm2d]
) -> nn.Module:
    """Exchange the batch norms of these kinds, in place; parameters and buffers are taken over."""
    if isinstance(module, kinds):
        norm = norm_class(module.num_features, eps=module.eps, momentum=module.momentum, affine=module.affine)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            setattr(norm, name, tensor)
        return norm
    for name, child in module.named_children():
        setattr(module, name, _replace(child, kinds, norm_class))
    return module


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
            'set its NORM (MODEL.RESNETS.NORM, MODEL.MOBILENETV2.NORM or MODEL.SLIMMABLE.NORM) to "BN" and '
            "MODEL.BACKBONE.FREEZE_AT below 5, or leave the key out."
        )


def unsynchronise(model: nn.Module) -> None:
    """Convert SyncBN, which several processes can share on GPUs only, to batch norm, in place."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        _replace(model, (nn.SyncBatchNorm,), nn.BatchNorm2d)
        logger.info("MODEL.DEVICE is a CPU: SyncBN is batch norm, with the statistics of each process alone.")

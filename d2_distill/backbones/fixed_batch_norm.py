"""Batch norm with fixed statistics and trained affine map, the norm of OpenMMLab's backbones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError


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
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            fixed = cls(module.num_features, eps=module.eps, affine=module.affine)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                setattr(fixed, name, tensor)
            return fixed
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
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
            'set its NORM (MODEL.RESNETS.NORM, MODEL.MOBILENETV2.NORM) to "BN" and MODEL.BACKBONE.FREEZE_AT below '
            "5, or leave the key out."
        )

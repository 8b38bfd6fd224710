"""Normalisation layers by name, batch norm with frozen statistics, batch norm shared by feature levels."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.Module):
    """Batch norm as a fixed affine map: everything is a buffer, nothing is learned or updated.

    With the initial values it is the identity.
    """

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # F.batch_norm would keep its input for gradients of the affine parameters that nobody asks for.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        # Weights converted from Caffe2 hold the affine map only.
        if (local_metadata.get("version") or 0) < 2:
            state_dict.setdefault(f"{prefix}running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(f"{prefix}running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d and SyncBatchNorm below ``module`` in place; names of the state stay.

        Returns:
            ``module``, or its replacement if it is itself a batch norm.
        """
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, eps=module.eps)
            for name, value in module.state_dict().items():
                setattr(frozen, name, value.clone())
            return frozen
        for name, child in module.named_children():
            setattr(module, name, cls.convert_frozen_batchnorm(child))
        return module


class CycleBatchNormList(nn.ModuleList):
    """Batch norm of a head shared by feature levels: one affine map, statistics of their own for every level.

    The n-th call uses the statistics of level n modulo ``length``, so a head must be called on all levels in
    order, every time.
    """

    def __init__(self, length: int, bn_class: type[nn.Module], num_features: int):
        super().__init__([bn_class(num_features, affine=False) for _ in range(length)])
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self._level = 0

    def forward(self, x: Tensor) -> Tensor:
        normalized = self[self._level](x)
        self._level = (self._level + 1) % len(self)
        return normalized * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


_NORMS = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """A norm for ``out_channels`` channels.

    Args:
        norm: "BN", "SyncBN", "FrozenBN", "GN" (32 groups), a function of the number of channels, or "" or
            None for no norm.

    Raises:
        KeyError: any other name.
    """
    if not norm:
        return None
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise KeyError(f"The embedded Detectron2 has no norm {norm!r}; use one of {', '.join(_NORMS)}.")
        norm = _NORMS[norm]
    return norm(out_channels)

"""Features of one task out of those that several tasks share."""

from __future__ import annotations

import torch
from detectron2.layers import get_norm
from torch import nn


class TaskDecomposition(nn.Module):
    """TOOD's layer attention (Feng et al., ICCV 2021, arXiv 2108.07755): a mixture of a tower's blocks.

    The mean of the joined blocks over the cells gives each block a factor in (0, 1); what is left of them goes through
    a 1x1 convolution, a norm and a ReLU.

    Args:
        blocks: number of blocks.
        channels: of each block, and of the result.
        norm: a name or a function, see ``detectron2.layers.get_norm``; "" for none.
    """

    # Channels of a block over hidden channels of the attention.
    REDUCTION = 8

    def __init__(self, blocks: int, channels: int, norm="") -> None:
        super().__init__()
        hidden = max(channels // self.REDUCTION, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(blocks * channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, blocks, 1), nn.Sigmoid()
        )
        self.mixture = nn.Conv2d(blocks * channels, channels, 1, bias=not norm)
        self.norm = get_norm(norm, channels) if norm else nn.Identity()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01 if layer is self.mixture else 0.001)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Joined blocks (N, blocks * C, H, W) to features (N, C, H, W)."""
        factors = self.attention(x.mean(dim=(2, 3), keepdim=True))
        weight = self.mixture.weight.flatten(1)
        # Factors on the weights instead of the features, of which they would make a copy.
        weight = weight * factors.flatten(1).repeat_interleave(len(weight), dim=1)[:, None]
        images, _, height, width = x.shape
        mixed = (weight @ x.flatten(2)).view(images, len(self.mixture.weight), height, width)
        if self.mixture.bias is not None:
            mixed = mixed + self.mixture.bias[:, None, None]
        return self.norm(mixed).relu()

"""C-FF, the cross-resolution feature fusion of MSAD."""

from __future__ import annotations

import torch
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn

from ..errors import UserError


class ScaleFusion(nn.Module):
    """Weighted sum of two maps, with the weights read off both (MSAD, Qi et al., arXiv 2109.06875).

    The channel means of both maps go through two linear layers without bias, with a ReLU between, to a
    softmax: one weight for each map of an image, the same for all channels and cells. All pyramid levels
    share the layers.

    Args:
        channels: of one map.
        reduction: channels of both maps over hidden channels.
        first_image: use the weights of the batch's first image for all of them, as the first published code
            did.

    Raises:
        UserError: there would be no hidden channel.
    """

    def __init__(self, channels: int, *, reduction: int = 16, first_image: bool = False) -> None:
        super().__init__()
        hidden = 2 * channels // reduction
        if hidden < 1:
            raise UserError(
                f"MODEL.MSAD.FUSION_REDUCTION is {reduction}, more than the {2 * channels} channels of two "
                "pyramid maps; lower it."
            )
        self.first_image = first_image
        self.fc = nn.Sequential(
            nn.Linear(2 * channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 2, bias=False)
        )
        for layer in (self.fc[0], self.fc[2]):
            c2_xavier_fill(layer)

    def scores(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to their weights (N, 2), which add up to 1."""
        means = torch.cat([high, low], dim=1).mean(dim=(2, 3))
        return self.fc(means).softmax(dim=1)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) of high and low resolution to the fused one."""
        scores = self.scores(high, low)
        if self.first_image:
            scores = scores[:1]
        of_high, of_low = scores[:, :, None, None, None].unbind(dim=1)
        return of_high * high + of_low * low

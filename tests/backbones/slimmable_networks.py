"""Slimmable networks in the slow form: all widths' weights, of which each call uses slices, as published."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

RESNET_WIDTHS = (0.25, 0.5, 0.75, 1.0)
MOBILENET_WIDTHS = (0.35, 0.5, 0.75, 1.0)


class Published:
    """Functional networks on one state dict with the names of the published files.

    Args:
        widths: their list; the last is the largest.
    """

    def __init__(self, widths: Sequence[float]) -> None:
        self.widths = widths
        self.state: dict[str, torch.Tensor] = {}
        torch.manual_seed(0)
        self(len(widths) - 1, torch.zeros(1, 3, 64, 64))  # makes the weights

    def __call__(self, index: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features res2 to res5 of (N, 3, H, W) at the width of an index."""
        raise NotImplementedError

    def unit(
        self,
        x: torch.Tensor,
        index: int,
        path: str,
        position: int,
        channels: list[int],
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        norm_of_each_width: bool = True,
    ) -> torch.Tensor:
        """Convolution number ``position`` of ``path`` and the norm behind it, to ``channels`` of each width."""
        conv, norm = f"{path}.{position}.weight", f"{path}.{position + 1}"
        if conv not in self.state:
            shape = (max(channels), 1 if depthwise else x.shape[1], kernel, kernel)
            self.state[conv] = torch.randn(shape) * (2 / (shape[1] * kernel**2)) ** 0.5
            for j, width_channels in enumerate(channels if norm_of_each_width else channels[:1]):
                prefix = f"{norm}.bn.{j}" if norm_of_each_width else norm
                for leaf, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                    self.state[f"{prefix}.{leaf}"] = torch.rand(width_channels) + low
                self.state[f"{prefix}.num_batches_tracked"] = torch.tensor(7 + j)
        out = channels[index]
        weight = self.state[conv][:out, : 1 if depthwise else x.shape[1]]
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=out if depthwise else 1)
        prefix = f"{norm}.bn.{index}" if norm_of_each_width else norm
        norms = {leaf: self.state[f"{prefix}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, **norms, eps=1e-5)


class PublishedResNet(Published):
    def __init__(self, widths: Sequence[float] = RESNET_WIDTHS, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        self.blocks = blocks
        super().__init__(widths)

    def __call__(self, index: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.unit(x, index, "features.0", 0, [int(64 * w) for w in self.widths], kernel=7, stride=2).relu()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features, layer = {}, 0
        for stage, (base, num_blocks) in enumerate(zip((64, 128, 256, 512), self.blocks)):
            out = [int(base * w * 4) for w in self.widths]
            mid = [channels // 4 for channels in out]
            for block in range(num_blocks):
                layer += 1
                path, stride = f"features.{layer}", 2 if stage > 0 and block == 0 else 1
                y = self.unit(x, index, f"{path}.body", 0, mid).relu()
                y = self.unit(y, index, f"{path}.body", 3, mid, kernel=3, stride=stride).relu()
                y = self.unit(y, index, f"{path}.body", 6, out)
                if block == 0:
                    x = self.unit(x, index, f"{path}.shortcut", 0, out, stride=stride)
                x = (x + y).relu()
            features[f"res{stage + 2}"] = x
        return features


class PublishedMobileNetV2(Published):
    def __init__(self, widths: Sequence[float] = MOBILENET_WIDTHS) -> None:
        super().__init__(widths)

    def channels(self, base: int) -> list[int]:
        return [divisible(base * w) for w in self.widths]

    def __call__(self, index: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        previous = self.channels(32)
        x = F.relu6(self.unit(x, index, "features.0", 0, previous, kernel=3, stride=2))
        features, layer = {}, 0
        for expansion, base, number, group_stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
        ):
            for block in range(number):
                layer += 1
                path, position, y = f"features.{layer}.body", 0, x
                stride, out = group_stride if block == 0 else 1, self.channels(base)
                hidden = [channels * expansion for channels in previous]
                if expansion != 1:
                    y, position = F.relu6(self.unit(y, index, path, 0, hidden)), 3
                y = F.relu6(self.unit(y, index, path, position, hidden, kernel=3, stride=stride, depthwise=True))
                y = self.unit(y, index, path, position + 3, out)
                x = x + y if stride == 1 and previous == out else y
                previous = out
            name: str | None = {24: "res2", 32: "res3", 96: "res4"}.get(base)
            if name:
                features[name] = x
        tail = self.unit(x, index, "features.18", 0, [1280] * len(self.widths), norm_of_each_width=False)
        return {**features, "res5": F.relu6(tail)}


def divisible(value: float) -> int:
    """The multiple of 8 next to a number of channels, but not less than 0.9 of it."""
    rounded = int(value + 4) // 8 * 8
    return rounded + 8 if rounded < 0.9 * value else rounded

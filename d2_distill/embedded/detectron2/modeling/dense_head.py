"""What heads that predict from anchors at every pixel share: initial weights, number and order of anchors."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .anchor_generator import build_anchor_generator


def fill_convs(head: nn.Module) -> None:
    """Give its convolutions, in their order, weights from N(0, 0.01^2) and zero biases."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def num_anchors_per_pixel(cfg, input_shape: list[ShapeSpec]) -> int:
    """The same on every level, as a head needs that all levels share."""
    num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
    assert len(set(num_anchors)) == 1, f"MODEL.ANCHOR_GENERATOR gives levels different numbers: {num_anchors}"
    return num_anchors[0]


def permute_to_N_HWA_K(tensor: Tensor, K: int) -> Tensor:
    """(N, A * K, H, W) to (N, H * W * A, K): channel a * K + k holds number k of anchor a."""
    N, _, H, W = tensor.shape
    return tensor.view(N, -1, K, H, W).permute(0, 3, 4, 1, 2).reshape(N, -1, K)

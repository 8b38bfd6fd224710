"""Swin Transformer, of torchvision's modules or Detectron2's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError
from .pyramid import build_pyramid, pyramid_features
from .torchvision_trunk import TorchvisionTrunk, require_three_channels

# Of torchvision's layers: patch embedding, then stages with patch merging between them.
STAGES = {"stem": 1, "res2": 2, "res3": 4, "res4": 6, "res5": 8}


@extend_config
def add_config(cfg: CfgNode) -> None:
    # The defaults are Swin-T. S: DEPTHS [2, 2, 18, 2]; B: also EMBED_DIM 128 and NUM_HEADS [4, 8, 16, 32].
    node = cfg.MODEL.SWIN = CfgNode()
    # Whose modules: "torchvision" or, with its own names and freezing, "detectron2" (not the embedded one).
    node.IMPLEMENTATION = "torchvision"
    # Channels of res2.
    node.EMBED_DIM = 96
    # Blocks of each stage.
    node.DEPTHS = [2, 2, 6, 2]
    # Attention heads of each stage.
    node.NUM_HEADS = [3, 6, 12, 24]
    # Side of the attention windows, in cells.
    node.WINDOW_SIZE = 7
    # Stochastic depth of the last block; it rises linearly from 0.
    node.DROP_PATH_RATE = 0.2


class SwinTransformer(TorchvisionTrunk):
    """torchvision's Swin Transformer (arXiv 2103.14030) with a LayerNorm on each output; features res2 to res5.

    On maps no larger than a window torchvision does not shift the windows, where the published detectors do.

    Args:
        embed_dim: channels of res2; each further stage has twice as many.
        depths, num_heads: blocks and attention heads of the four stages.
        window_size: side of the attention windows, in cells.
        drop_path_rate: stochastic depth of the last block, in training; it rises linearly from 0. Frozen stages
            have none.
        out_features, freeze_at: see TorchvisionTrunk; the stem is the patch embedding. A frozen stage's LayerNorm
            is frozen, too.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float,
        out_features: Sequence[str],
        freeze_at: int,
    ) -> None:
        model = torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[window_size, window_size],
            stochastic_depth_prob=drop_path_rate,
        )
        channels = {f"res{index + 2}": embed_dim * 2**index for index in range(len(depths))}
        super().__init__(model.features, stages=STAGES, channels=channels, out_features=out_features)
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(channels) for name, channels in self._out_feature_channels.items()}
        )
        self.freeze(freeze_at)

    def freeze(self, freeze_at: int) -> None:
        super().freeze(freeze_at)
        for name, norm in self.norms.items():
            if STAGES[name] <= len(self.frozen_layers(freeze_at)):
                norm.requires_grad_(False)
        for module in self.frozen_layers(freeze_at).modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0

    def feature(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(N, H, W, C) to (N, C, H, W)."""
        return self.norms[name](x).permute(0, 3, 1, 2)


class Detectron2Swin(Backbone):
    """Detectron2's Swin Transformer, with features res2 to res5; below ``swin`` are its own names.

    Swin's published weights fit it (MODEL.WEIGHTS ``swin.pth?matching_heuristics=True``). ``freeze_at`` 2 freezes
    the patch merging behind res2, too, and so on.
    """

    def __init__(self, *, out_features: Sequence[str], freeze_at: int, **kwargs) -> None:
        super().__init__()
        try:
            from detectron2.modeling.backbone import SwinTransformer as Original

            self.swin = Original(
                out_indices=tuple(int(name[len("res") :]) - 2 for name in out_features),
                frozen_stages=freeze_at or -1,
                **kwargs,
            )
        except ImportError as error:
            raise UserError(
                "MODEL.SWIN.IMPLEMENTATION is 'detectron2', which needs a real Detectron2 and timm "
                f"({error}); install them or choose 'torchvision'."
            ) from error
        self._out_features = list(out_features)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(zip(self._out_features, self.swin.output_shape().values()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W) to features (N, C, H / stride, W / stride), by name."""
        return dict(zip(self._out_features, self.swin(x).values()))


IMPLEMENTATIONS = {"torchvision": SwinTransformer, "detectron2": Detectron2Swin}


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Swin Transformer of ``MODEL.SWIN`` with :func:`~d2_distill.backbones.build_pyramid` on it.

    Raises:
        UserError: ``MODEL.SWIN.IMPLEMENTATION`` is unknown, or Detectron2's is wanted where there is none.
    """
    require_three_channels(input_shape)
    node = cfg.MODEL.SWIN
    if node.IMPLEMENTATION not in IMPLEMENTATIONS:
        raise UserError(
            f"MODEL.SWIN.IMPLEMENTATION is {node.IMPLEMENTATION!r}; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    if not len(node.DEPTHS) == len(node.NUM_HEADS) == 4:
        raise UserError(
            f"MODEL.SWIN.DEPTHS is {list(node.DEPTHS)} and NUM_HEADS {list(node.NUM_HEADS)}; "
            "give four stages of each."
        )
    bottom_up = IMPLEMENTATIONS[node.IMPLEMENTATION](
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        out_features=pyramid_features(cfg),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return build_pyramid(cfg, bottom_up)

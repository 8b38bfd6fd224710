"""A detector that sees fewer pixels: its pyramid reads every FACTOR-th row and column of the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..config.keys import extend_config
from ..errors import UserError

# Factor -> levels by which a pyramid of the small image is shifted.
OCTAVES = {2: 1, 4: 2}


@extend_config
def add_config(cfg: CfgNode) -> None:
    # A detector that sees every FACTOR-th row and column of its images, while boxes stay in pixels of the whole ones.
    node = cfg.MODEL.LOW_RESOLUTION = CfgNode()
    # Builder of the pyramid that reads the small images.
    node.BACKBONE = "build_p3p7_resnet_fpn_backbone"
    # 2 or 4.
    node.FACTOR = 2
    # Pad images to detect as for training (800x1333 to 1024x1536), as published. False pads less, which is faster, but
    # then group norms see other statistics; measure what it costs.
    node.ALIGN_TEST = True


def decimate(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Every ``factor``-th row and column of (N, C, H, W), without smoothing, as in MSAD's code."""
    return images[..., ::factor, ::factor]


def require_factor(factor: int, key: str) -> None:
    """
    Raises:
        UserError: pyramid levels of the small and the whole image would not coincide.
    """
    if factor not in OCTAVES:
        raise UserError(f"{key} is {factor}; choose one of {', '.join(map(str, OCTAVES))}.")


class LowResolution(Backbone):
    """A pyramid on the decimated images, its maps named and measured as those of the whole ones.

    Level p(k) of the small image has the size of level p(k + log2 factor) of the whole image, and is called
    so. Images are to be padded to ``factor`` times the coarsest stride, as in MSAD's code: then a pyramid of
    the whole image has maps of the same sizes. To detect, that can be left out.

    Args:
        pyramid: backbone with feature maps p<log2 stride>.
        factor: 2 or 4.
        align_test: pad to detect as in training; False pads no more than the pyramid itself needs.
    """

    def __init__(self, pyramid: Backbone, *, factor: int, align_test: bool = True) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.factor = factor
        self.align_test = align_test
        self._names = {name: f"p{int(name[1:]) + OCTAVES[factor]}" for name in pyramid.output_shape()}

    @property
    def bottom_up(self) -> nn.Module:
        """What the pyramid stands on, where Detectron2's FPN has it."""
        return self.pyramid.bottom_up

    @property
    def size_divisibility(self) -> int:
        """Of the whole images."""
        if self.training or self.align_test:
            return self.factor * max(shape.stride for shape in self.output_shape().values())
        return self.factor * max(self.pyramid.size_divisibility, 1)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            self._names[name]: ShapeSpec(channels=shape.channels, stride=shape.stride * self.factor)
            for name, shape in self.pyramid.output_shape().items()
        }

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Whole images (N, 3, H, W) to maps (N, C, H / stride, W / stride), by name."""
        maps = self.pyramid(decimate(images, self.factor))
        return {self._names[name]: x for name, x in maps.items()}


@BACKBONE_REGISTRY.register()
def build_low_resolution_backbone(cfg, input_shape: ShapeSpec) -> LowResolution:
    """The pyramid of ``MODEL.LOW_RESOLUTION.BACKBONE`` on decimated images, as MSAD's students have it.

    To begin at P3 (P4 for a FACTOR of 4) of the whole image, it has to begin at P2 of the small one. The
    head's IN_FEATURES are named and sized as those of the detector on whole images; so are ground truth
    and detections.

    Raises:
        UserError: BACKBONE is no pyramid builder or gives no P2, or FACTOR is neither 2 nor 4.
    """
    node = cfg.MODEL.LOW_RESOLUTION
    require_factor(node.FACTOR, "MODEL.LOW_RESOLUTION.FACTOR")
    own_name = build_low_resolution_backbone.__name__
    if node.BACKBONE == own_name or node.BACKBONE not in BACKBONE_REGISTRY:
        known = sorted(name for name, _ in BACKBONE_REGISTRY if name != own_name and "fpn" in name)
        raise UserError(
            f"MODEL.LOW_RESOLUTION.BACKBONE is {node.BACKBONE!r}, which builds no pyramid; choose one of "
            f"{', '.join(known)}."
        )
    pyramid = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    names = list(pyramid.output_shape())
    if "p2" not in names:
        raise UserError(
            f"MODEL.LOW_RESOLUTION.BACKBONE {node.BACKBONE} gives {', '.join(names)}, but a small image "
            "needs the level p2; add 'res2' to MODEL.FPN.IN_FEATURES (and to MODEL.RESNETS.OUT_FEATURES)."
        )
    return LowResolution(pyramid, factor=node.FACTOR, align_test=node.ALIGN_TEST)


def require_levels_used(backbone: nn.Module, wanted: Sequence[str], kind: str) -> None:
    """Check that a detector reads every level of a low-resolution pyramid; other backbones may have levels to spare.

    Args:
        wanted: names of the levels that it reads.
        kind: what the error message calls the detector.

    Raises:
        UserError: it does not, and layers of the pyramid would have no gradient.
    """
    if not isinstance(backbone, LowResolution):
        return
    unused = [name for name in backbone.output_shape() if name not in wanted]
    if unused:
        raise UserError(
            f"The low-resolution pyramid has {', '.join(unused)}, which the head of {kind} "
            f"does not read (it reads {', '.join(wanted)}); leave such levels out by MODEL.FPN.TOP_BLOCK "
            "('P6', or '' for none above P5), or add them to the head's IN_FEATURES."
        )

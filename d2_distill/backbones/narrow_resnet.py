"""ResNet-18 and -34 of any width, for small students: Detectron2's builder allows the full width only."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..errors import UserError

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """FPN on a ResNet whose stages have RES2_OUT_CHANNELS * (1, 2, 4, 8) channels.

    Reads DEPTH, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, NORM and OUT_FEATURES of ``MODEL.RESNETS``,
    ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN``. Modules are named as in Detectron2's ResNet; the pyramid
    has no level beyond IN_FEATURES.

    Raises:
        UserError: the depth is neither 18 nor 34.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in BLOCKS_PER_STAGE:
        raise UserError(
            f"MODEL.RESNETS.DEPTH is {node.DEPTH}; build_narrow_resnet_fpn_backbone builds 18 and 34, "
            "deeper ones are build_resnet_fpn_backbone's."
        )
    stem = BasicStem(in_channels=input_shape.channels, out_channels=node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages = []
    in_channels = node.STEM_OUT_CHANNELS
    for index, num_blocks in enumerate(BLOCKS_PER_STAGE[node.DEPTH]):
        out_channels = node.RES2_OUT_CHANNELS * 2**index
        strides = [1 if index == 0 else 2] + [1] * (num_blocks - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock, num_blocks, in_channels=in_channels, out_channels=out_channels,
                stride_per_block=strides, norm=node.NORM,
            )
        )
        in_channels = out_channels
    bottom_up = ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    fpn = cfg.MODEL.FPN
    return FPN(
        bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        fuse_type=fpn.FUSE_TYPE,
    )

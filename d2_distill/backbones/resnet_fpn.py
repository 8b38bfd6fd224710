"""ResNet and FPN with the levels above P5 as the config says."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, build_resnet_backbone

from .pyramid import build_pyramid


@BACKBONE_REGISTRY.register()
def build_p3p7_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet and FPN, by default with P6 and P7 as in FCOS, ATSS and GFL.

    See :func:`~d2_distill.backbones.build_pyramid`; with ``MODEL.FPN.TOP_BLOCK_IN_FEATURE`` "res5" and
    ``TOP_BLOCK_RELU`` it is ``build_retinanet_resnet_fpn_backbone``.
    """
    return build_pyramid(cfg, build_resnet_backbone(cfg, input_shape))

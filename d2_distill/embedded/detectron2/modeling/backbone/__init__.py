"""The backbones: ResNet and FPN, their registry and builders."""

from .backbone import BACKBONE_REGISTRY, Backbone, build_backbone  # noqa: F401
from .fpn import FPN  # noqa: F401
from .resnet import (  # noqa: F401
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    build_resnet_backbone,
)

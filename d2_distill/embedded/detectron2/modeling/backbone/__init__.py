"""The backbones: ResNet and FPN, their registry and builders."""

from .backbone import BACKBONE_REGISTRY, Backbone, build_backbone  # noqa: F401
from .fpn import FPN  # noqa: F401
from .resnet import BasicStem, BottleneckBlock, ResNet, build_resnet_backbone  # noqa: F401

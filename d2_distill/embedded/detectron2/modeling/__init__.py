"""The parts of detectors, their registries, and whole detectors."""

from .anchor_generator import build_anchor_generator  # noqa: F401
from .backbone import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_backbone, build_resnet_backbone  # noqa: F401
from .meta_arch import FCOS, META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet, build_model  # noqa: F401
from .postprocessing import detector_postprocess  # noqa: F401

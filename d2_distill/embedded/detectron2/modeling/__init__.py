"""The parts of detectors, their registries, and whole detectors."""

from .backbone import BACKBONE_REGISTRY, FPN, build_backbone, build_resnet_backbone  # noqa: F401
from .meta_arch import FCOS, META_ARCH_REGISTRY, build_model  # noqa: F401
from .postprocessing import detector_postprocess  # noqa: F401

"""The detectors RetinaNet, FCOS and GeneralizedRCNN, their registry and build_model."""

from .build import META_ARCH_REGISTRY, build_model  # noqa: F401
from .dense_detector import DenseDetector  # noqa: F401
from .fcos import FCOS  # noqa: F401
from .rcnn import GeneralizedRCNN  # noqa: F401
from .retinanet import RetinaNet  # noqa: F401

"""The checkpointer of detection models, and the published weights that it can be given by name."""

from . import catalog  # noqa: F401  (registers its path prefix)
from .detection_checkpoint import DetectionCheckpointer  # noqa: F401

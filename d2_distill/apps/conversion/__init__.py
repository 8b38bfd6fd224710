"""What converters of checkpoints share: tensors by our names, the config that they belong to, and the file."""

from __future__ import annotations

from .files import require_new_file, require_pairs, save_converted, save_detector
from .parts import TORCHVISION_STYLE, faster_rcnn_settings, pyramid, resnet
from .reading import is_state_dict, read_tensors
from .result import Conversion, merged
from .tensors import Converted, Tensors

__all__ = [
    "TORCHVISION_STYLE",
    "Conversion",
    "Converted",
    "Tensors",
    "faster_rcnn_settings",
    "is_state_dict",
    "merged",
    "pyramid",
    "read_tensors",
    "require_new_file",
    "require_pairs",
    "resnet",
    "save_converted",
    "save_detector",
]

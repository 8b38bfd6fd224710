"""Checkpoints of OpenMMLab's detectors (MMDetection 2.x and 3.x) as weights and configs of ours."""

from __future__ import annotations

from .backbones import pyramid
from .conversion import Conversion, convert
from .heads import dense_head
from .reading import Checkpoint, read_checkpoint, read_tensors
from .tensors import Tensors
from .training_config import STYLES

__all__ = [
    "STYLES",
    "Checkpoint",
    "Conversion",
    "Tensors",
    "convert",
    "dense_head",
    "pyramid",
    "read_checkpoint",
    "read_tensors",
]

"""Checkpoints of OpenMMLab's detectors (MMDetection 2.x and 3.x) as weights and configs of ours."""

from __future__ import annotations

from .. import Conversion, Tensors
from .backbones import pyramid
from .detector import convert_openmmlab
from .heads import dense_head
from .reading import Checkpoint, read_checkpoint
from .training_config import STYLES

__all__ = [
    "STYLES",
    "Checkpoint",
    "Conversion",
    "Tensors",
    "convert_openmmlab",
    "dense_head",
    "pyramid",
    "read_checkpoint",
]

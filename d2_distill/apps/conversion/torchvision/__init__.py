"""Checkpoints of torchvision's detectors as weights and configs of ours."""

from __future__ import annotations

from .classes import COCO_OUTPUTS, Classes, kept_classes
from .detector import convert_torchvision
from .reading import read_state_dict

__all__ = ["COCO_OUTPUTS", "Classes", "convert_torchvision", "kept_classes", "read_state_dict"]

"""Detectors beside Detectron2's own, and the stages of all; importing this package registers them."""

from __future__ import annotations

from .fcos import FCOS
from .openmmlab_retinanet import OpenMMLabRetinaNet
from .stock import StagedFCOS, StagedRCNN, StagedRetinaNet

__all__ = ["FCOS", "OpenMMLabRetinaNet", "StagedFCOS", "StagedRCNN", "StagedRetinaNet"]

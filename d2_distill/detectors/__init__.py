"""Detectors beside Detectron2's own, and the stages of all; importing this package registers them."""

from __future__ import annotations

from .atss import ATSS
from .fcos import FCOS, OpenMMLabFCOS
from .gfl import GFL, GFLv2
from .multi_scale import MultiScaleDetector, StagedMultiScale
from .openmmlab_retinanet import OpenMMLabRetinaNet
from .stock import StagedFCOS, StagedRCNN, StagedRetinaNet
from .tood import TOOD
from .torchvision import TorchvisionAnchorGenerator, TorchvisionFCOS, TorchvisionRetinaNet
from .tower_detector import StagedTowerDetector, TowerDetector

__all__ = [
    "ATSS",
    "FCOS",
    "GFL",
    "GFLv2",
    "MultiScaleDetector",
    "TOOD",
    "TowerDetector",
    "OpenMMLabFCOS",
    "OpenMMLabRetinaNet",
    "StagedFCOS",
    "StagedMultiScale",
    "StagedTowerDetector",
    "StagedRCNN",
    "StagedRetinaNet",
    "TorchvisionAnchorGenerator",
    "TorchvisionFCOS",
    "TorchvisionRetinaNet",
]

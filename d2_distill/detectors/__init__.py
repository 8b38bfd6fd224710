"""Detectors beside Detectron2's own, and the stages of all; importing this package registers them."""

from __future__ import annotations

from ..staged import register_staged
from .atss import ATSS
from .fcos import FCOS, OpenMMLabFCOS
from .fusion import ScaleFusion
from .gfl import GFL, GFLv2
from .multi_scale import MultiScaleDetector, StagedMultiScale
from .one_stage import OneStageDetector, StagedOneStage
from .openmmlab_retinanet import OpenMMLabRetinaNet
from .stock import StagedFCOS, StagedRCNN, StagedRetinaNet
from .torchvision import TorchvisionAnchorGenerator, TorchvisionFCOS, TorchvisionRetinaNet

for _model_class in (ATSS, GFL, GFLv2, OpenMMLabFCOS, OpenMMLabRetinaNet):
    register_staged(_model_class)(StagedOneStage)

__all__ = [
    "ATSS",
    "FCOS",
    "GFL",
    "GFLv2",
    "MultiScaleDetector",
    "OneStageDetector",
    "OpenMMLabFCOS",
    "OpenMMLabRetinaNet",
    "ScaleFusion",
    "StagedFCOS",
    "StagedMultiScale",
    "StagedOneStage",
    "StagedRCNN",
    "StagedRetinaNet",
    "TorchvisionAnchorGenerator",
    "TorchvisionFCOS",
    "TorchvisionRetinaNet",
]

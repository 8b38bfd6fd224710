"""Distillation of object detectors, a Detectron2 project extension.

Importing it chooses the Detectron2 and registers the distiller, the detectors, the backbones and the methods.
"""

from __future__ import annotations

import warnings

from . import provider

# fvcore scripts its losses while it is imported, so newer torch would warn at the start of every tool.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
provider.select()  # before anything imports detectron2

from . import assistants, backbones, detectors, methods
from .data import pictures
from .config.keys import add_distill_config
from .data.registration import register_datasets
from .detectors import TowerDetector
from .detectors.building import build_detector
from .distiller import Distiller
from .errors import PairError, UserError
from .methods import DISTILL_METHOD_REGISTRY, DistillMethod
from .staged import StagedDense, StagedDetector, register_staged, stage_detector
from .teacher import Teacher

pictures.use_everywhere()

__all__ = [
    "DISTILL_METHOD_REGISTRY",
    "DistillMethod",
    "Distiller",
    "PairError",
    "StagedDense",
    "StagedDetector",
    "Teacher",
    "TowerDetector",
    "UserError",
    "add_distill_config",
    "build_detector",
    "register_datasets",
    "register_staged",
    "stage_detector",
]

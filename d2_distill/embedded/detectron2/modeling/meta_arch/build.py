"""META_ARCH_REGISTRY and build_model."""

from __future__ import annotations

import functools

import numpy as np
from detectron2.utils.registry import Registry
from torch import nn

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = "Whole models, built from ``(cfg)``."

# Keys that switch on what the embedded subset leaves out.
_LEFT_OUT = (
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "TEST.PRECISE_BN.ENABLED",
    "VIS_PERIOD",
)


def build_model(cfg) -> nn.Module:
    """Build the model named by MODEL.META_ARCHITECTURE on MODEL.DEVICE; weights are not loaded.

    Raises:
        NotImplementedError: the config, also in keys of training and testing, asks for what is left out here.
    """
    for key in _LEFT_OUT:
        value = functools.reduce(getattr, key.split("."), cfg)
        if np.any(value):
            raise NotImplementedError(f"{key} is {value}, which needs an installed Detectron2.")
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)

"""The plain detector that a config describes, distilled or not."""

from __future__ import annotations

import functools
from operator import getitem

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from .. import provider
from ..backbones.low_resolution import require_levels_used
from ..errors import UserError
from ..layers.deformable import move_to_torchvision
from ..layers.fixed_batch_norm import fix_statistics, unsynchronise
from ..staged import adapter_of, declared_adapter
from .nms import select_nms

DISTILLER = "Distiller"


def plain_config(cfg: CfgNode) -> CfgNode:
    """The config of the plain student: its own meta-architecture in the place of the distiller's."""
    if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILL.STUDENT
    cfg.freeze()
    return cfg


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the detector without teacher, methods or adapters, on ``MODEL.DEVICE``, weights not loaded.

    Raises:
        UserError: its meta-architecture is unknown, or a key asks for what its backbone does not have,
            or ``TEST.NMS`` for what the detector cannot do.
    """
    key = "MODEL.DISTILL.STUDENT" if cfg.MODEL.META_ARCHITECTURE == DISTILLER else "MODEL.META_ARCHITECTURE"
    cfg = plain_config(cfg)
    name = cfg.MODEL.META_ARCHITECTURE
    if name == DISTILLER or name not in META_ARCH_REGISTRY:
        known = sorted(entry for entry, _ in META_ARCH_REGISTRY if entry != DISTILLER)
        raise UserError(f"{key} is {name!r}, which is no detector; choose one of {', '.join(known)}.")
    model = build_model(cfg)
    adapter = adapter_of(type(model))
    if adapter is not None:
        require_levels_used(model.backbone, list(adapter(model).feature_shapes()), name)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        unsynchronise(model)
        if provider.name() == "real":
            move_to_torchvision(model)
    if cfg.MODEL.BACKBONE.FIXED_BN_STATISTICS:
        fix_statistics(model.backbone)
    select_nms(model, cfg.TEST.NMS)
    return model


def num_classes_key(cfg: CfgNode) -> str | None:
    """Return the config key that sets the number of classes of the detector's head, as its staged adapter declares it.

    None if the detector is unknown, or has no adapter.

    Raises:
        UserError: the config has no such key.
    """
    cfg = plain_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return None
    model_class = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    adapter = declared_adapter(model_class)
    if adapter is None:
        return None
    key = adapter.num_classes_key(model_class, cfg)
    try:
        functools.reduce(getitem, key.split("."), cfg)
    except (KeyError, TypeError):
        raise UserError(
            f"{adapter.__name__}.num_classes_key is {key!r}, which is no key of the config; correct it, or add the key in "
            "add_config of the file that IMPORTS names."
        ) from None
    return key

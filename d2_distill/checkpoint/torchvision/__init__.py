"""ImageNet weights of torchvision's classifiers for the backbones of detectors."""

from __future__ import annotations

from .address import PREFIX, TorchvisionWeights, is_address
from .layouts import identified_rules, marked_rules, renamed, resnet_rules, shapes_of
from .loading import check_pretrained, fit_classifier, load_pretrained, require_fitting

__all__ = [
    "PREFIX",
    "TorchvisionWeights",
    "check_pretrained",
    "fit_classifier",
    "identified_rules",
    "is_address",
    "load_pretrained",
    "marked_rules",
    "renamed",
    "require_fitting",
    "resnet_rules",
    "shapes_of",
]

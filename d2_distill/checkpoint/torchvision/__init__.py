"""ImageNet weights of torchvision's and timm's classifiers for the backbones of detectors."""

from __future__ import annotations

from .address import PIXEL_MEAN, PIXEL_STD, PREFIX, TorchvisionWeights
from .layouts import identified_rules, marked_rules, renamed, resnet_rules, shapes_of
from .loading import check_pretrained, fit_classifier, is_address, load_pretrained, require_fitting, weights_of

__all__ = [
    "PIXEL_MEAN",
    "PIXEL_STD",
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
    "weights_of",
]

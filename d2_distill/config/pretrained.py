"""How ImageNet weights of torchvision and timm see images, and the config keys that have to agree with it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from operator import getitem
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint.torchvision import PIXEL_MEAN, is_address, weights_of
from ..errors import UserError
from .reading import read_config

logger = logging.getLogger(__name__)

# Detectron2's default mean is ImageNet's of BGR images.
_USUAL = {"PIXEL_MEAN": (PIXEL_MEAN, PIXEL_MEAN[::-1]), "PIXEL_STD": ((1.0, 1.0, 1.0),)}
_TOLERANCE = 0.01
_STRIDE_KEY = "MODEL.RESNETS.STRIDE_IN_1X1"
_KEYS = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", _STRIDE_KEY)


def with_pretrained_inputs(
    cfg: CfgNode, *, config_file: str = "", opts: Sequence[Any] = (), trained: bool = False
) -> CfgNode:
    """Return the config with the keys that a classifier's address in ``MODEL.WEIGHTS`` needs, see :func:`corrections`.

    Args:
        config_file, opts: what ``cfg`` was read from.
        trained: ``MODEL.WEIGHTS`` of ``opts`` names a detector that was trained with the config file. So the weights
            that the file names, which that training started from, count as well, unless ``opts`` set the keys.

    Raises:
        UserError: see :func:`corrections`.
    """
    weights, set_keys = cfg.MODEL.WEIGHTS, set(opts[::2])
    if trained and "MODEL.WEIGHTS" in set_keys and not is_address(weights) and not set_keys.intersection(_KEYS):
        others = [item for pair in zip(opts[::2], opts[1::2]) if pair[0] != "MODEL.WEIGHTS" for item in pair]
        weights = read_config(config_file, others, source=f"The config ({config_file})").MODEL.WEIGHTS
    if not is_address(weights):
        return cfg
    changed = corrections(cfg, weights)
    if not changed:
        return cfg
    logger.info(
        "%s: %s, as the weights were trained.",
        weights, ", ".join(f"{key} is {value} (it was {_value(cfg, key)})" for key, value in changed.items()),
    )
    corrected, frozen = cfg.clone(), cfg.is_frozen()
    corrected.defrost()
    corrected.merge_from_list([item for pair in changed.items() for item in pair])
    if frozen:
        corrected.freeze()
    return corrected


def corrections(cfg: CfgNode, address: str) -> dict[str, Any]:
    """Return the keys that have another value than these weights need, with the value that they need.

    ``INPUT.FORMAT`` stays: :func:`~d2_distill.checkpoint.torchvision.load_pretrained` exchanges red and blue in the
    first convolution. A mean or a standard deviation is corrected if it is Detectron2's default, or the needed one in
    the order of the other format.

    Raises:
        UserError: there is no such model, or a key has a value that is neither a default nor what the weights need.
    """
    weights = weights_of(address)
    order = {"RGB": 1, "BGR": -1}.get(cfg.INPUT.FORMAT)
    if order is None:
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but {address} was trained with colors; set it to RGB or BGR."
        )
    changed: dict[str, Any] = {}
    for key, theirs in (("PIXEL_MEAN", weights.pixel_mean), ("PIXEL_STD", weights.pixel_std)):
        ours, needed = cfg.MODEL[key], theirs[::order]
        if _equal(ours, needed):
            continue
        if not any(_equal(ours, other) for other in (needed[::-1], *_USUAL[key])):
            raise UserError(
                f"MODEL.{key} is {list(ours)}, but {address} was trained with {list(needed)} in the order of "
                f"INPUT.FORMAT {cfg.INPUT.FORMAT}; set it to that, or remove it from the config."
            )
        changed[f"MODEL.{key}"] = list(needed)
    if weights.model == "mobilenet_v2" and cfg.MODEL.MOBILENETV2.SAME_PADDING:
        raise UserError(
            f"MODEL.MOBILENETV2.SAME_PADDING is True, but {address} was trained with padding on all sides; set it to "
            "False."
        )
    if _value(cfg, _STRIDE_KEY) and weights.has_bottlenecks():
        changed[_STRIDE_KEY] = False
    return changed


def require_corrected(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: the config was not read by :func:`with_pretrained_inputs`, and needs it.
    """
    changed = corrections(cfg, cfg.MODEL.WEIGHTS)
    if changed:
        needed = ", ".join(f"{key} {value}" for key, value in changed.items())
        raise UserError(
            f"MODEL.WEIGHTS: {cfg.MODEL.WEIGHTS} needs {needed}; set that, or read the config by "
            "d2_distill.engine.setup.load_config, which does."
        )


def _equal(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(ours) == len(theirs) and all(abs(x - y) <= _TOLERANCE for x, y in zip(ours, theirs))


def _value(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getitem, key.split("."), cfg)

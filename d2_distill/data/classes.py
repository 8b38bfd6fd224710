"""The classes of a config's detector: their names, and the size of its head that follows from them."""

from __future__ import annotations

import functools
import logging
from operator import getitem

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..config.class_names import listed
from ..detectors.building import num_classes_key, plain_config
from ..errors import UserError
from ..staged import adapter_of
from .registration import declared_names, register_datasets

logger = logging.getLogger(__name__)


def dataset_classes(cfg: CfgNode, *, register: bool = False) -> list[str]:
    """Names of a detector's classes in the order of its outputs, ``DATASETS.CLASSES``; empty if they are not known.

    Where the key is empty, those of the first registered data set of ``DATASETS.TRAIN``, else of ``DATASETS.TEST``,
    that tells its classes without being loaded.

    Args:
        register: register data sets that the config declares as far as they are asked for, see :func:`with_classes`.
    """
    return list(cfg.DATASETS.CLASSES) or _of_datasets(cfg, register)[0]


def with_classes(cfg: CfgNode) -> CfgNode:
    """The config with its classes in ``DATASETS.CLASSES``, and their number in the detector's ``NUM_CLASSES``.

    What :func:`dataset_classes` does not know stays as it is. Data sets that the config declares are registered as far
    as they are asked for; one whose files are missing or unusable is passed over with a warning.

    Raises:
        UserError: ``DATASETS.CLASSES`` is no list of different names.
    """
    _check(cfg.DATASETS.CLASSES)
    names, source = list(cfg.DATASETS.CLASSES), "DATASETS.CLASSES"
    if not names:
        names, source = _of_datasets(cfg, register=True)
    if not names:
        return cfg
    key = num_classes_key(cfg)
    if key is None and names == list(cfg.DATASETS.CLASSES):
        return cfg
    if key is None:
        logger.warning(
            "%s has no staged adapter that declares the config key of its number of classes, so that number stays as it is: "
            "set it for the %d classes of %s, or register an adapter (docs/architecture.md).",
            plain_config(cfg).MODEL.META_ARCHITECTURE, len(names), source,
        )
        return _named(cfg, names)
    before, number = functools.reduce(getitem, key.split("."), cfg), len(names)
    if before == number and names == list(cfg.DATASETS.CLASSES):
        return cfg
    sized = _named(cfg, names, key, number)
    was = "as it was" if before == number else f"it was {before}"
    logger.info("%s is %d (%s), for the classes of %s: %s.", key, number, was, source, listed(names))
    return sized


def check_outputs(cfg: CfgNode, model: nn.Module) -> None:
    """Check that a detector predicts the classes of its config.

    A detector without a staged adapter is asked for its attribute ``num_classes``, which Detectron2's own have; what has
    none is not checked.

    Raises:
        UserError: it predicts another number of classes than ``DATASETS.CLASSES`` names.
    """
    names, adapter, kind = cfg.DATASETS.CLASSES, adapter_of(type(model)), type(model).__name__
    if not names:
        return
    if adapter is None:
        outputs, remedy = getattr(model, "num_classes", len(names)), "set its number in the config"
    else:
        outputs = adapter(model).num_classes
        remedy = f"let it read {num_classes_key(cfg)}, which its staged adapter declares"
    if outputs != len(names):
        raise UserError(
            f"{kind} predicts {outputs} classes, but DATASETS.CLASSES has {len(names)} ({listed(names)}); {remedy}."
        )


def _named(cfg: CfgNode, names: list[str], *overrides: object) -> CfgNode:
    """The config with these class names, and with overrides, keys and values."""
    named, frozen = cfg.clone(), cfg.is_frozen()
    named.defrost()
    named.merge_from_list(["DATASETS.CLASSES", tuple(names), *overrides])
    if frozen:
        named.freeze()
    return named


def _of_datasets(cfg: CfgNode, register: bool = False) -> tuple[list[str], str]:
    """The class names, and which data set they come from."""
    declared = declared_names(cfg)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if register and name in declared:
                try:
                    register_datasets(cfg, names=(name,))
                except UserError as error:
                    logger.warning("The classes of the data set %r are not known: %s", name, error)
            names = list(MetadataCatalog.get(name).get("thing_classes", None) or [])
            if names:
                return names, f"the data set {name!r} (DATASETS.{key})"
    return [], ""


def _check(names) -> None:
    wrong = next((name for name in names if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise UserError(f"DATASETS.CLASSES has {wrong!r}; write the name of each class, in quotes.")
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UserError(f"DATASETS.CLASSES has {twice!r} twice; make the class names unique.")

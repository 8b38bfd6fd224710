"""``MODEL.DISTILL.METHODS ("auto",)``: the methods that did best for such a pair, with weights that follow the gradients."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import PairError, UserError
from ..staged import StagedDetector
from ..teacher import Teacher
from .base import DISTILL_METHOD_REGISTRY, build_methods
from .pairing import require_teacher

logger = logging.getLogger(__name__)
AUTO = "auto"
METHODS_KEY, BALANCE_KEY = "MODEL.DISTILL.METHODS", "MODEL.DISTILL.BALANCE"
PUBLISHED = "published"


@dataclass(frozen=True)
class Choice:
    """Methods for the pairs that all of them serve.

    Attributes:
        methods: their names.
        reason: the measurement behind it.
    """

    methods: tuple[str, ...]
    reason: str


# The first whose methods all serve the pair is taken. Measured by benchmarks/defaults; docs/choosing.md has the tables.
CHOICES = (
    Choice(
        ("PKD",),
        "the feature pyramids share strides, and PKD did best on the data that was tried (docs/choosing.md)",
    ),
)


def is_auto(cfg: CfgNode) -> bool:
    """Return whether the methods are to be chosen.

    Raises:
        UserError: "auto" stands beside other names.
    """
    names = list(cfg.MODEL.DISTILL.METHODS)
    if AUTO in names and len(names) > 1:
        raise UserError(f'{METHODS_KEY} is {tuple(names)}; "auto" stands alone: leave it out, or the other names.')
    return names == [AUTO]


def balance_period(cfg: CfgNode) -> int:
    """Return the iterations between two updates of the weights; 0 where the weights are the configured ones.

    Raises:
        UserError: ``MODEL.DISTILL.BALANCE`` or ``BALANCE_PERIOD`` has a wrong value.
    """
    node = cfg.MODEL.DISTILL
    if node.BALANCE not in ("", AUTO, PUBLISHED):
        raise UserError(f'{BALANCE_KEY} is {node.BALANCE!r}; choose "auto", "published" or "".')
    if node.BALANCE_PERIOD < 1:
        raise UserError(f"{BALANCE_KEY}_PERIOD is {node.BALANCE_PERIOD}; it must be at least 1.")
    follows = node.BALANCE == AUTO or (not node.BALANCE and is_auto(cfg))
    return node.BALANCE_PERIOD if follows else 0


def build_chosen_methods(cfg: CfgNode, student: StagedDetector, teacher: Teacher | None) -> nn.ModuleDict:
    """Return the methods of the config, or those that "auto" chooses for the pair, and log which and why.

    Raises:
        UserError: see :func:`build_methods`.
        PairError: there is no teacher, or no choice serves the pair.
    """
    if not is_auto(cfg):
        return build_methods(cfg, student, teacher)
    teacher = require_teacher(teacher, f'{METHODS_KEY} "auto"')
    choice = choose(cfg, student, teacher)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.METHODS = choice.methods
    methods = build_methods(cfg, student, teacher)
    described = "; ".join(f"{name} ({method.describe()})" for name, method in methods.items())
    logger.info(
        '%s "auto" takes %s, because %s. Weights: %s.', METHODS_KEY, described, choice.reason,
        "balanced by their gradients" if balance_period(cfg) or not cfg.MODEL.DISTILL.BALANCE else "as published",
    )
    return methods


def choose(cfg: CfgNode, student: StagedDetector, teacher: Teacher) -> Choice:
    """Return the first of ``CHOICES`` whose methods all serve the pair.

    Raises:
        PairError: none does.
    """
    refusals: dict[str, UserError] = {}
    with torch.random.fork_rng(devices=[]):
        for choice in CHOICES:
            try:
                for name in choice.methods:
                    DISTILL_METHOD_REGISTRY.get(name).from_config(cfg, student, teacher)
                return choice
            except UserError as error:
                refusals[name] = error
    raise PairError(
        f'{METHODS_KEY} "auto" finds no method for the student {student.kind} and the teacher {teacher.staged.kind}: '
        f"{' '.join(map(str, refusals.values()))}"
    )

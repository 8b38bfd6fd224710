"""Evaluation of a checkpoint."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from ..checkpoint.exact import load_exactly
from ..checkpoint.resuming import find_resumable
from ..detectors.building import build_detector
from .trainer import Trainer


def load_detector(cfg: CfgNode, resume: bool = False, *, weights_key: str = "MODEL.WEIGHTS") -> nn.Module:
    """The student with ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of ``OUTPUT_DIR``.

    No teacher is built, loaded or run. Error messages call the weights ``weights_key``.

    Raises:
        UserError: the checkpoint is missing, or does not fit the model exactly.
    """
    model = build_detector(cfg)
    weights = (find_resumable(cfg.OUTPUT_DIR) if resume else "") or cfg.MODEL.WEIGHTS
    load_exactly(model, weights, key=weights_key)
    return model


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Evaluate on every data set of ``DATASETS.TEST``, also with test-time augmentation if ``TEST.AUG`` asks for
    it, and against ``TEST.EXPECTED_RESULTS``."""
    results = {**Trainer.test(cfg, model), **Trainer.test_augmented(cfg, model)}
    if comm.is_main_process():
        verify_results(cfg, results)
    return results

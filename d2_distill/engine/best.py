"""The checkpoint of the best evaluation."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..checkpoint.exact import readable
from ..checkpoint.harmless import require_no_program
from ..whole_files import whole_file
from .evaluation import METRIC

BEST = "model_best.pth"

logger = logging.getLogger(__name__)


class BestCheckpoint(HookBase):
    """Keep the student with the highest AP so far in ``model_best.pth``, with that AP and its iteration.

    Detectron2's own BestCheckpointer does not serve: it forgets the best value when a run is resumed, and makes
    ``last_checkpoint`` point to a file from which the run would then be resumed. Here the value is read from the file
    itself, so the two always agree.

    Args:
        model: the student; it holds the weights that were evaluated.
        folder: the run's output folder.
        test_set: the first data set of ``DATASETS.TEST``.
    """

    def __init__(self, model: nn.Module, folder: str, test_set: str) -> None:
        self._model = model
        self._path = os.path.join(folder, BEST)
        self._test_set = test_set
        self._best: dict[str, Any] | None = None

    def before_train(self) -> None:
        # A file in the folder of a run that starts is not this run's.
        if self.trainer.start_iter > 0 and comm.is_main_process() and os.path.isfile(self._path):
            with readable(self._path, key="OUTPUT_DIR"):
                require_no_program(self._path)
                best = torch.load(self._path, map_location="cpu", weights_only=True)["best"]
            if best["test_set"] == self._test_set:  # the APs on two data sets cannot be compared
                self._best = best

    def observe(self, score: float, iteration: int) -> None:
        if not comm.is_main_process() or not math.isfinite(score):
            return
        if self._best is not None and score <= self._best["value"]:
            logger.info(
                "%s on %s is %.4f after iteration %d; the best is %.4f after iteration %d.", METRIC,
                self._test_set, score, iteration, self._best["value"], self._best["iteration"],
            )
            return
        self._best = {"metric": METRIC, "test_set": self._test_set, "value": score, "iteration": iteration}
        self._save()
        logger.info(
            "%s on %s is %.4f after iteration %d, the best so far; saved it as %s.", METRIC, self._test_set, score,
            iteration, self._path,
        )

    def _save(self) -> None:
        with whole_file(Path(self._path)) as partial, partial.open("wb") as file:
            torch.save({"model": self._model.state_dict(), "best": self._best}, file)

"""A run of a model of one number whose evaluations give the APs that a test lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.hooks import PeriodicCheckpointer
from torch import nn

from d2_distill.engine.best import BestCheckpoint
from d2_distill.engine.early_stop import EarlyStopping, StoppableLoop
from d2_distill.engine.evaluation import PeriodicEvaluation
from d2_distill.engine.hooks import LossNormalizers


class ToyRun(StoppableLoop):
    """Each step adds 1 to the weight, and each evaluation adds the weight to ``evaluated``.

    Args:
        scores: AP of the weights 1, 2, ...
        resume: from the last checkpoint in the folder.
    """

    def __init__(
        self, folder: Path, scores: Sequence[float], *, period: int = 1, checkpoint_period: int = 100,
        patience: int = 0, resume: bool = False, test_set: str = "val",
    ) -> None:
        super().__init__()
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(()))])
        self.scores = scores
        self.evaluated: list[int] = []
        self.max_iter = len(scores)
        self.checkpointer = DetectionCheckpointer(self.model, str(folder), trainer=self)
        normalizers = LossNormalizers(self.model, checkpoint_period)
        best = BestCheckpoint(self.model, str(folder), test_set)
        stopping = [EarlyStopping(patience, test_set, normalizers)] if patience else []
        evaluation = PeriodicEvaluation(period, [test_set], [best, *stopping])
        saving = PeriodicCheckpointer(self.checkpointer, checkpoint_period)
        self.register_hooks([normalizers, saving, best, evaluation, *stopping])
        self.checkpointer.resume_or_load("", resume=resume)
        self.first = self.iter + 1 if resume and self.checkpointer.has_checkpoint() else 0

    def run_step(self) -> None:
        with torch.no_grad():
            self.model[0] += 1

    def evaluate(self) -> dict[str, dict[str, float]]:
        self.evaluated.append(int(self.model[0]))
        return {"bbox": {"AP": self.scores[self.evaluated[-1] - 1]}}

    def go(self, steps: int | None = None) -> ToyRun:
        """Train up to the end, or as if killed after that many steps in total."""
        if steps is None:
            self.train(self.first, self.max_iter)
            return self
        with_kill = self.after_step

        def after_step() -> None:
            with_kill()
            if self.iter + 1 == steps:
                raise KeyboardInterrupt

        self.after_step = after_step
        try:
            self.train(self.first, self.max_iter)
        except KeyboardInterrupt:
            return self
        raise AssertionError("The run was not killed.")

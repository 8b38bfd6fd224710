"""End a run whose AP no longer rises."""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from ..errors import UserError
from .evaluation import METRIC
from .hooks import FINAL, LossNormalizers

logger = logging.getLogger(__name__)


class StoppedEarly(BaseException):
    """Leaves the training loop, which logs every Exception as a failure."""


class StoppableLoop(TrainerBase):
    """A training loop that :class:`EarlyStopping` can end. Its place is after ``DefaultTrainer`` among the bases."""

    def train(self, start_iter: int, max_iter: int) -> None:
        try:
            super().train(start_iter, max_iter)
        except StoppedEarly:
            pass  # the hooks have seen a run of as many steps as there were


class EarlyStopping(HookBase):
    """End the run after ``patience`` evaluations in a row without a better AP on the first test set.

    To be registered after :class:`~.evaluation.PeriodicEvaluation`, of which it is a follower. A run that has ended
    does not train on when it is resumed, unless with more patience.

    Args:
        normalizers: gathers what the checkpoint needs.
    """

    def __init__(self, patience: int, test_set: str, normalizers: LossNormalizers) -> None:
        self._patience = patience
        self._test_set = test_set
        self._normalizers = normalizers
        self._state: dict[str, Any] = {"best": None, "best_iteration": None, "iteration": -1, "worse": 0}

    def observe(self, score: float, iteration: int) -> None:
        state = self._state
        if iteration <= state["iteration"]:  # a resumed run may repeat the evaluation of its checkpoint
            return
        state["iteration"] = iteration
        if math.isfinite(score) and (state["best"] is None or score > state["best"]):
            state.update(best=score, best_iteration=iteration, worse=0)
        else:
            state["worse"] += 1

    def before_train(self) -> None:
        if self.trainer.start_iter < self.trainer.max_iter:
            self._end_if_exhausted(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self._end_if_exhausted(self.trainer.iter)

    def _end_if_exhausted(self, iteration: int) -> None:
        """
        Raises:
            StoppedEarly: the run ends after ``iteration``, the last step that was made.
        """
        if self._state["worse"] < self._patience:
            return
        checkpointer = self.trainer.checkpointer
        self.trainer.iter = iteration  # also if the run was killed before it could end, and is being resumed
        if not checkpointer.get_checkpoint_file().endswith(f"{FINAL}.pth"):
            self._normalizers.gather()
            checkpointer.save(FINAL, iteration=iteration)
        best, best_iteration = self._state["best"], self._state["best_iteration"]
        logger.info(
            "Stopped early after iteration %d: in %d evaluations %s on %s was not better than %s. Raise "
            "SOLVER.EARLY_STOPPING.PATIENCE and --resume to train on.", iteration, self._state["worse"], METRIC,
            self._test_set, "any" if best is None else f"{best:.4f} after iteration {best_iteration}",
        )
        self.trainer.iter = self.trainer.max_iter = iteration + 1
        comm.synchronize()
        raise StoppedEarly

    def state_dict(self) -> dict[str, Any]:
        return {**self._state, "test_set": self._test_set} if self._state["iteration"] >= 0 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["test_set"] == self._test_set:  # the APs on two data sets cannot be compared
            self._state = {name: state[name] for name in self._state}


def check_early_stopping(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: ``SOLVER.EARLY_STOPPING.PATIENCE`` is negative, or there are no evaluations to count.
    """
    patience = cfg.SOLVER.EARLY_STOPPING.PATIENCE
    if patience < 0:
        raise UserError(
            f"SOLVER.EARLY_STOPPING.PATIENCE is {patience}; set it to a number of evaluations, or to 0 to train up to "
            "SOLVER.MAX_ITER."
        )
    if patience and cfg.TEST.EVAL_PERIOD <= 0:
        raise UserError(
            f"SOLVER.EARLY_STOPPING.PATIENCE is {patience}, but TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so the run "
            "is not evaluated before its end; set TEST.EVAL_PERIOD to the number of iterations between evaluations."
        )
    if patience and not cfg.DATASETS.TEST:
        raise UserError(
            f"SOLVER.EARLY_STOPPING.PATIENCE is {patience}, but DATASETS.TEST is empty; name the data set whose AP "
            "decides."
        )

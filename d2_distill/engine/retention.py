"""Delete old checkpoints."""

from __future__ import annotations

import os
import re

from detectron2.config import CfgNode
from detectron2.engine.hooks import PeriodicCheckpointer

from ..errors import UserError

_PERIODIC = re.compile(r"model_(\d{7})\.pth")


class RecentCheckpoints(PeriodicCheckpointer):
    """Detectron2's, which also deletes the checkpoints that an earlier process of a resumed run wrote.

    Only files called ``model_`` and seven digits are deleted; checkpoints after a signal are among them.
    """

    def before_train(self) -> None:
        super().before_train()
        # Not those after the step that the run is resumed at: they are written again.
        found = {name: int(match[1]) for name in os.listdir(self.checkpointer.save_dir)
                 if (match := _PERIODIC.fullmatch(name))}
        names = sorted((name for name in found if found[name] < self.trainer.start_iter), key=found.get)
        paths = [os.path.join(self.checkpointer.save_dir, name) for name in names]
        self.recent_checkpoints = paths[-self.max_to_keep :]
        for path in paths[: -self.max_to_keep]:
            if path != self.checkpointer.get_checkpoint_file():
                os.remove(path)


def check_retention(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: ``SOLVER.CHECKPOINTS_KEPT`` is negative.
    """
    if cfg.SOLVER.CHECKPOINTS_KEPT < 0:
        raise UserError(
            f"SOLVER.CHECKPOINTS_KEPT is {cfg.SOLVER.CHECKPOINTS_KEPT}; set it to the number of periodic checkpoints "
            "to keep, or to 0 to keep all."
        )

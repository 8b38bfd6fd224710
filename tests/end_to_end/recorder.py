"""train_net.py, with each iteration's exact losses in OUTPUT_DIR/losses.jsonl, and a signal at a chosen one.

``SIGNAL_AT="SIGKILL 5 0"`` sends SIGKILL to the process of rank 0 at the beginning of iteration 5 (from 0).
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from detectron2.engine import HookBase, default_argument_parser
from detectron2.utils import comm

import train_net
from d2_distill.engine import Trainer, start


class Recorder(HookBase):
    def before_step(self) -> None:
        name, iteration, rank = os.environ.get("SIGNAL_AT", "none -1 0").split()
        if (self.trainer.iter, comm.get_rank()) == (int(iteration), int(rank)):
            os.kill(os.getpid(), getattr(signal, name))

    def after_step(self) -> None:
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            losses = {name: value for name, (value, _) in latest.items() if "loss" in name}
            with open(os.path.join(self.trainer.cfg.OUTPUT_DIR, "losses.jsonl"), "a") as file:
                file.write(json.dumps({"iteration": self.trainer.iter, **losses}) + "\n")


class RecordedTrainer(Trainer):
    def build_hooks(self) -> list:
        return [Recorder(), *super().build_hooks()]


def main(args: Any) -> Any:
    train_net.Trainer = RecordedTrainer
    return train_net.main(args)


if __name__ == "__main__":
    start(main, default_argument_parser().parse_args())

"""The training loop, its hooks, the default trainer and the launcher of processes."""

from . import hooks  # noqa: F401
from .defaults import DefaultTrainer, default_argument_parser, default_setup  # noqa: F401
from .launch import launch  # noqa: F401
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase  # noqa: F401

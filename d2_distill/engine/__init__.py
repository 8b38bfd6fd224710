"""Training and evaluation: Detectron2's engine with exact resume, any optimiser, and processes on the CPU."""

from __future__ import annotations

from .arguments import list_choices, parse_arguments
from .evaluate import evaluate
from .launch import start
from .setup import setup
from .trainer import Trainer

__all__ = ["Trainer", "evaluate", "list_choices", "parse_arguments", "setup", "start"]

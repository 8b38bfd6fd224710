"""Training and evaluation: Detectron2's engine with exact resume, any optimiser, and processes on the CPU."""

from __future__ import annotations

from .arguments import argument_parser, list_choices
from .evaluate import evaluate
from .launch import start
from .setup import setup
from .trainer import Trainer

__all__ = ["Trainer", "argument_parser", "evaluate", "list_choices", "setup", "start"]

"""Distillation of object detectors, a Detectron2 project extension."""

from __future__ import annotations

from . import provider

provider.select()

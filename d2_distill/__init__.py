"""Distillation of object detectors, a Detectron2 project extension."""

from __future__ import annotations

import warnings

from . import provider

# fvcore scripts its losses while it is imported, so newer torch would warn at the start of every tool.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
provider.select()

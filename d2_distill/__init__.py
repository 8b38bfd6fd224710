"""Distillation of object detectors, a Detectron2 project extension."""

from __future__ import annotations

import warnings

from . import provider

# fvcore scripts its losses while it is imported, so newer torch would warn at the start of every tool.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
provider.select()

from . import methods  # noqa: E402, F401  registers all methods and their config keys, once Detectron2 is chosen

"""Selects the Detectron2 provider before any test module imports detectron2."""

import d2_distill  # noqa: F401
import pytest
import torch


@pytest.fixture(autouse=True)
def unoptimised_scripts():
    """The scripted focal loss rounds its gradient otherwise from its second call on, once it is optimised."""
    with torch.jit.optimized_execution(False):
        yield

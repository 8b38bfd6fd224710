"""Selects the Detectron2 provider before any test module imports detectron2."""

import logging

import pytest
import torch

import d2_distill  # noqa: F401


@pytest.fixture(autouse=True)
def unoptimised_scripts():
    """The scripted focal loss rounds its gradient otherwise from its second call on, once it is optimised."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(autouse=True)
def handlers_of_loggers():
    """What a test opens ends with it: a handler of its captured output would fail in the tests after it."""
    loggers = [logging.getLogger(name) for name in ("d2_distill", "detectron2", "fvcore")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before):
        logger.handlers[:] = handlers

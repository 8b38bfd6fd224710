"""METHODS "auto": which methods a pair gets, and how they adapt to it."""

from __future__ import annotations

import logging

import pytest

from d2_distill.errors import PairError, UserError
from d2_distill.methods.automatic import CHOICES, balance_period

from ..small_detectors import batch, distiller_cfg, save_teacher
from ..test_distiller import build_distiller, forward

CASES = ("RetinaNet", "GFL", "GeneralizedRCNN")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in CASES}


@pytest.mark.parametrize("student", ["RetinaNet", "OpenMMLabFCOS", "GFL", "TOOD", "GeneralizedRCNN"])
@pytest.mark.parametrize("teacher", CASES)
def test_every_pair_gets_methods_that_train(student, teacher, teachers, caplog):
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        model = build_distiller(student, teachers[teacher], ["auto"])
    [message] = [record.getMessage() for record in caplog.records if '"auto" takes' in record.getMessage()]
    assert tuple(model.methods) in {choice.methods for choice in CHOICES}
    assert all(name in message for name in model.methods) and "because" in message and "balanced" in message
    losses = forward(model, batch())
    sum(losses.values()).backward()
    assert model.balance is not None


def test_what_differs_is_adapted_and_said(tmp_path, caplog):
    """Pyramids of other widths."""
    wide = save_teacher(tmp_path, "GFL", FPN__OUT_CHANNELS=64, GFL__NUM_CONVS=3)
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        model = build_distiller("GFL", wide, ["auto"])
    assert "1x1 convolutions adapt the channels, 32 to 64" in caplog.text
    losses = forward(model, batch())
    sum(losses.values()).backward()
    adapters = dict(model.methods.named_parameters())
    assert len(adapters) == 3 and all(weight.grad.abs().sum() > 0 for weight in adapters.values())


def test_auto_stands_alone(teachers):
    with pytest.raises(UserError, match='"auto" stands alone'):
        build_distiller("RetinaNet", teachers["RetinaNet"], ["auto", "PKD"])


def test_auto_needs_a_teacher():
    with pytest.raises(PairError, match='METHODS "auto" needs a teacher'):
        build_distiller("RetinaNet", None, ["auto"])


def test_when_weights_are_balanced(teachers):
    def period(methods, balance):
        return balance_period(distiller_cfg("GFL", teachers["GFL"], methods, DISTILL__BALANCE=balance))

    assert period(["auto"], "") == period(["PKD"], "auto") == period(["auto"], "auto") > 0
    assert period(["PKD"], "") == period(["PKD"], "published") == period(["auto"], "published") == 0

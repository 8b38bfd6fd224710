"""Weights that follow the gradients: the rule, its state, and what it does to a training step."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.errors import UserError
from d2_distill.methods.balance import DISTRUST, LARGEST_CHANGE, TOLERANCE, GradientBalance, modulation

from ..small_detectors import batch, save_teacher
from ..test_distiller import build_distiller, forward

AUTO = {"DISTILL__BALANCE": "auto"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in ("RetinaNet", "GFL", "GeneralizedRCNN")
    }


@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.24, 1.26, 5.0])
def test_modulation_leads_to_the_nearer_bound(ratio):
    factor = modulation(ratio, target=1.0)
    if 1 / TOLERANCE <= ratio <= TOLERANCE:
        assert factor == 1
    else:
        bound = TOLERANCE if ratio > 1 else 1 / TOLERANCE
        assert ratio * factor == pytest.approx(bound)
        # RT-DETRv4's rule in shares of the norm.
        share, nearest = ratio / (1 + ratio), bound / (1 + bound)
        assert factor == pytest.approx(nearest * (1 - share) / (share * (1 - nearest)))


def test_a_weight_changes_at_most_tenfold_at_a_time():
    assert modulation(1e-6, 1.0) == LARGEST_CHANGE and modulation(1e6, 1.0) == 1 / LARGEST_CHANGE
    balance = GradientBalance({"a": 1.0}, period=10)
    factors = []
    for _ in range(8):
        balance.update({"a": 1e-4})
        factors.append(balance.factor("a"))
    assert factors[0] == LARGEST_CHANGE
    assert factors[-1] * 1e-4 == pytest.approx(1 / TOLERANCE)


def test_each_term_keeps_its_own_ratio():
    balance = GradientBalance({"a": 1.0, "b": 0.1}, period=10)
    for _ in range(20):
        balance.update({"a": 20.0, "b": 0.004})
    assert 20.0 * balance.factor("a") == pytest.approx(TOLERANCE)
    assert 0.004 * balance.factor("b") == pytest.approx(0.1 / TOLERANCE)
    before = balance.factor("a")
    balance.update({"a": 0.0})  # no gradient in this batch, such as without any object
    assert balance.factor("a") == before
    assert balance.factor("without a target") == 1


def test_measures_often_at_first():
    balance = GradientBalance({"a": 1.0}, period=20)
    assert [i for i in range(81) if balance.is_due(i)] == [0, 1, 2, 4, 8, 16, 20, 40, 60, 80]


def test_a_wrong_teacher_loses_its_say_and_regains_it():
    balance = GradientBalance({"a": 1.0}, period=10)
    balance.compare(teacher=1.0, student=3.0)
    assert balance.say == 1
    for _ in range(30):
        balance.compare(teacher=3.0, student=2.0)
    assert balance.factor("a") == balance.say < DISTRUST**20
    for _ in range(60):
        balance.compare(teacher=1.0, student=2.0)
    assert balance.say == 1


def test_state_continues_exactly():
    first = GradientBalance({"a": 1.0, "b": 2.0}, period=10)
    first.update({"a": 7.0, "b": 0.3})
    first.compare(teacher=2.0, student=1.0)
    second = GradientBalance({"a": 1.0, "b": 2.0}, period=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for balance in (first, second):
        balance.update({"a": 5.0, "b": 0.2})
        balance.compare(teacher=2.0, student=1.5)
    assert first.state_dict() == second.state_dict() and first.factor("a") == second.factor("a") != 1


@pytest.mark.parametrize("student, teacher", [("RetinaNet", "RetinaNet"), ("GFL", "RetinaNet"), ("GeneralizedRCNN",) * 2])
def test_weights_reach_their_ratios(student, teacher, teachers):
    """Whatever the configured weight, the terms end at the same values, those of the target ratio."""
    name, key = ("PKD", "DISTILL__PKD__WEIGHT")
    found = []
    for weight in (0.01, 500.0):
        model = build_distiller(student, teachers[teacher], [name], **AUTO, **{key: weight})
        for iteration in (0, 1, 2, 4, 8):
            torch.manual_seed(5)
            with EventStorage(iteration) as storage:
                losses = model(batch())
        latest = {scalar: value for scalar, (value, _) in storage.latest().items()}
        assert latest["distill_weight/pkd"] == pytest.approx(weight * model.balance.factor("loss_pkd"))
        assert latest["distill_say"] == model.balance.say
        found.append((losses["loss_pkd"] / model.balance.say).item())
    low, high = sorted(found)
    assert 1 < high / low <= TOLERANCE**2 * 1.01


def test_published_is_as_if_there_were_no_balance(teachers):
    results = []
    for options in ({}, {"DISTILL__BALANCE": "published"}, AUTO):
        model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **options)
        results.append(forward(model, batch(), iteration=3))
    assert results[0] == results[1] == results[2]  # iteration 3 is not measured, so the factors are still 1


def test_bad_values(teachers):
    for options, message in (
        ({"DISTILL__BALANCE": "on"}, 'MODEL.DISTILL.BALANCE is \'on\'; choose "auto", "published" or "".'),
        ({**AUTO, "DISTILL__BALANCE_PERIOD": 0}, "MODEL.DISTILL.BALANCE_PERIOD is 0; it must be at least 1."),
    ):
        with pytest.raises(UserError) as error:
            build_distiller("RetinaNet", teachers["RetinaNet"], ["PKD"], **options)
        assert str(error.value) == message


def test_nothing_to_balance(teachers):
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD"], **AUTO, DISTILL__CROSSKD__CLS_TAP=1)
    model.student.backbone.requires_grad_(False)
    model._unchecked_steps = 0  # the check of the terms' gradients, which comes first, would refuse it as well
    with pytest.raises(UserError, match="nothing below the student's feature maps is trained"):
        forward(model, batch())

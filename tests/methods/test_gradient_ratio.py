"""Gradients of terms at the student's features: right numbers, and a training that does not notice."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.distiller import Distiller
from d2_distill.methods import DistillMethod
from d2_distill.methods.gradient_ratio import HIGHEST, LOWEST, gradient_norm
from d2_distill.methods.schedules import build_schedule

from ..engine.test_listing import R_CNN_ASSISTANT
from ..small_detectors import allowed_methods, batch, build, detector_cfg, save_teacher
from ..test_distiller import build_distiller, forward

PERIOD = "DISTILL__GRADIENT_RATIO_PERIOD"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    cases = ("RetinaNet", "GeneralizedRCNN")
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in cases}


def ratios_of(model, iteration: int = 0, inputs=None):
    """The scalars of a step at the trainer's iteration, by term."""
    torch.manual_seed(5)
    with EventStorage(iteration) as storage:
        model(inputs or batch())
    prefix = "grad_ratio/"
    return {name[len(prefix) :]: value for name, (value, _) in storage.latest().items() if name.startswith(prefix)}


def test_norm_over_all_maps():
    weight = torch.full((), 2.0, requires_grad=True)
    features = [weight * torch.ones(1, 1, 2, 2), weight * torch.ones(1, 1, 1, 1), weight * torch.ones(1)]
    value = 3 * features[0].sum() - 8 * features[1].sum() + weight
    for _ in range(2):  # the graph is still there
        torch.testing.assert_close(gradient_norm(value, features), torch.tensor(10.0))
    assert weight.grad is None and gradient_norm(weight * 1.0, features) == 0 == gradient_norm(torch.ones(()), features)


def test_small_gradients_of_half_precision_do_not_vanish():
    feature = torch.ones(4, requires_grad=True).half()
    value = (feature.float() * 1e-8).sum()
    assert not torch.autograd.grad(value, feature, retain_graph=True)[0].any()
    torch.testing.assert_close(gradient_norm(value, [feature]), torch.tensor(2e-8), rtol=0.05, atol=0)


class PartsOfTheOwnLosses(DistillMethod):
    def forward(self, student, teacher):
        return {term: sum(student.losses.values()) for term in self.weights}


@pytest.mark.parametrize("case", ["GFL", "GeneralizedRCNN"])
def test_ratio_to_the_student_s_own_losses(case, caplog):
    weights = {"loss_half": 0.5, "loss_huge": 2 * HIGHEST, "loss_tiny": LOWEST / 2, "other": 1.0}
    schedule = {term: build_schedule([["Warmup", 10]] if term == "loss_half" else []) for term in weights}
    methods = nn.ModuleDict({"Parts": PartsOfTheOwnLosses(weights=weights, schedule=schedule)})
    student = build(detector_cfg(case)).train()
    model = Distiller(
        student=student, teacher=None, methods=methods, input_format="BGR", gradient_ratio_period=3
    )
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        found = ratios_of(model, iteration=5)
    assert found == pytest.approx({term.replace("loss_", ""): weight for term, weight in weights.items()}, rel=1e-4)
    [message] = [record.getMessage() for record in caplog.records if "Gradients at the features" in record.msg]
    assert "at iteration 5: loss_half 0.5 (times 0.5 by its schedule now); loss_huge" in message
    assert "loss_huge 20 (above 10: consider lowering its weight)" in message
    assert f"loss_tiny 0.005 (below {LOWEST}: consider raising its weight); other 1" in message
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not ratios_of(model, iteration=6) and len(ratios_of(model, iteration=8)) == 4


def test_weights_count_and_schedules_do_not(teachers, caplog):
    options = {PERIOD: 1, "DISTILL__PKD__SCHEDULE": [["Warmup", 10]], "DISTILL__CROSSKD__BOX_WEIGHT": 0.0}
    model = build_distiller("GFL", teachers["RetinaNet"], ["CrossKD", "PKD"], **options)
    found = ratios_of(model, iteration=0)
    assert set(found) == {"crosskd_cls", "pkd"} and all(ratio > 0 for ratio in found.values())
    model.methods["PKD"].weights["loss_pkd"] *= 1000
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        heavy = ratios_of(model, iteration=5)
        assert "(times 0.5 by its schedule now) (above" in caplog.text
        assert "consider lowering MODEL.DISTILL.PKD.WEIGHT)" in caplog.text
        caplog.clear()
        assert ratios_of(model, iteration=0) == heavy  # it has no effect yet, or no longer
        assert "(times 0 by its schedule now)" in caplog.text and "PKD.WEIGHT" not in caplog.text
    assert heavy["pkd"] == pytest.approx(1000 * found["pkd"], rel=1e-3)
    assert heavy["crosskd_cls"] == found["crosskd_cls"]


@pytest.mark.parametrize("case", ["RetinaNet BN", "OpenMMLabFCOS distributions", "GFLv2", "GeneralizedRCNN"])
def test_training_does_not_notice(case, teachers):
    """A step's losses and gradients are the same bit by bit, and so are the random numbers that it leaves."""
    teacher_case = "GeneralizedRCNN" if "RCNN" in case else "RetinaNet"
    methods, options = allowed_methods(case, teacher_case), {}
    if "RCNN" not in case:
        methods, options = [*methods, "TFHEAD"], R_CNN_ASSISTANT
    results = []
    for period in (0, 1):
        model = build_distiller(case, teachers[teacher_case], methods, **options, **{PERIOD: period})
        losses = forward(model, batch())
        sum(losses.values()).backward()
        results.append((losses, dict(model.named_parameters()), torch.get_rng_state()))
    (without, plain, random_state), (with_it, measured, other_random_state) = results
    assert all(torch.equal(with_it[term], value) for term, value in without.items()) and list(with_it) == list(without)
    assert all(torch.equal(measured[name].grad, value.grad) for name, value in plain.items())
    assert torch.equal(random_state, other_random_state)
    found = ratios_of(model, iteration=1)
    assert set(found) == {term.replace("loss_", "") for m in model.methods.values() for term in m.weights}
    assert all(ratio > 0 for ratio in found.values())


def test_mixed_precision(teachers):
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **{PERIOD: 1})
    expected = ratios_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ratios_of(model, iteration=1)
    assert found == pytest.approx(expected, rel=0.5) and found != expected
    losses = forward(model, batch())
    sum(losses.values()).backward()

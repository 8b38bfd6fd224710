"""Terms that clash, that nobody declared, that are missing, or whose weight is 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_distill.distiller import CHECKED_STEPS, Distiller
from d2_distill.errors import UserError
from d2_distill.methods import DISTILL_METHOD_REGISTRY, DistillMethod, build_methods
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import batch, build, detector_cfg, distiller_cfg
from ..test_distiller import forward


class Returns(DistillMethod):
    """Returns the mean of a feature map under each of some names."""

    def __init__(self, weights, names=None) -> None:
        super().__init__(weights=weights, schedule=build_schedule([]))
        self.names = weights if names is None else names
        self.calls = 0

    def forward(self, student, teacher):
        self.calls += 1
        return {name: student.features["p3"].mean() for name in self.names}


def distiller_with(case="RetinaNet", **methods) -> Distiller:
    student = build(detector_cfg(case)).train()
    return Distiller(student=student, teacher=None, methods=nn.ModuleDict(methods), input_format="BGR")


def registered(monkeypatch, name: str, weights) -> None:
    """Register a method as a user's file does."""

    class Mine(Returns):
        reads_teacher = False

        @classmethod
        def from_config(cls, cfg, student, teacher):
            return {"weights": weights}

    monkeypatch.setitem(DISTILL_METHOD_REGISTRY._obj_map, name, Mine)


def built(*names, **overrides):
    student, other = (build(detector_cfg("RetinaNet")) for _ in range(2))
    cfg = distiller_cfg("RetinaNet", None, names, **overrides)
    return build_methods(cfg, stage_detector(student), Teacher(other, input_format="BGR"))


# Two terms of one name.


def test_two_methods_of_the_user_with_one_term(monkeypatch):
    registered(monkeypatch, "Mine", {"loss_a": 1.0, "loss_b": 1.0})
    registered(monkeypatch, "Other", {"loss_c": 1.0, "loss_b": 0.5})
    with pytest.raises(UserError, match="METHODS: Mine and Other both have a term loss_b, .*rename it"):
        built("Mine", "PKD", "Other")


@pytest.mark.parametrize("names", [("PKD", "Mine"), ("Mine", "PKD")])
def test_a_method_of_the_user_with_the_term_of_a_built_in_one(monkeypatch, names):
    registered(monkeypatch, "Mine", {"loss_pkd": 1.0})
    with pytest.raises(UserError, match=f"{names[0]} and {names[1]} both have a term loss_pkd"):
        built(*names)


def test_terms_that_are_switched_off_do_not_clash(monkeypatch):
    registered(monkeypatch, "Mine", {"loss_pkd": 0.0, "loss_mine": 1.0})
    methods = built("PKD", "Mine")
    assert [list(method.weights) for method in methods.values()] == [["loss_pkd"], ["loss_mine"]]
    registered(monkeypatch, "Mine", {"loss_pkd": 1.0})
    assert list(built("PKD", "Mine", DISTILL__PKD__WEIGHT=0.0)) == ["Mine"]


def test_built_in_methods_do_not_clash():
    terms = [
        term
        for name, method in DISTILL_METHOD_REGISTRY
        if method.__module__.startswith("d2_distill.")
        for term in method.WEIGHT_KEYS
    ]
    assert len(terms) >= 16 and len(set(terms)) == len(terms)


@pytest.mark.parametrize(
    "case, loss", [("RetinaNet", "loss_cls"), ("GFL", "loss_dfl"), ("GeneralizedRCNN", "loss_rpn_cls")]
)
def test_a_term_with_the_name_of_a_students_loss(case, loss):
    weights = {"loss_mine": 1.0, loss: 1.0}
    with pytest.raises(UserError, match=rf"the term {loss} of Mine has .*own losses \(.*{loss}.*\) .*; rename the"):
        forward(distiller_with(case, Mine=Returns(weights)), batch())
    # Switched off it replaces nothing.
    losses = forward(distiller_with(case, Mine=Returns({**weights, loss: 0.0})), batch())
    plain = forward(build(detector_cfg(case)).train(), batch())
    assert set(losses) == {*plain, "loss_mine"} and torch.equal(losses[loss], plain[loss])


# Terms that are returned, but not declared, and the other way round.


def test_a_term_of_weight_0_that_is_returned_is_ignored():
    method = Returns({"loss_on": 2.0, "loss_off": 0.0})
    model = distiller_with(Mine=method)
    losses = forward(model, batch())
    plain = forward(build(detector_cfg("RetinaNet")).train(), batch())
    assert list(losses) == [*plain, "loss_on"] and method.calls == 1
    # A term that is ignored need not be finite either.
    method.forward = lambda student, teacher: {
        "loss_on": student.features["p3"].mean(), "loss_off": student.features["p3"].mean() * float("nan"),
    }
    assert torch.equal(forward(model, batch())["loss_on"], losses["loss_on"])


def test_a_term_that_was_never_declared():
    model = distiller_with(Mine=Returns({"loss_a": 1.0, "loss_b": 0.0}, names=["loss_a", "loss_c"]))
    message = r"Mine returns the term loss_c, for which it has no weight \(it has weights for loss_a, loss_b\); add"
    with pytest.raises(UserError, match=message):
        forward(model, batch())
    # In every step.
    model.methods["Mine"].names = ["loss_a"]
    for _ in range(CHECKED_STEPS):
        forward(model, batch())
    model.methods["Mine"].names = ["loss_a", "loss_c"]
    with pytest.raises(UserError, match=message):
        forward(model, batch())


def test_a_term_that_is_missing():
    model = distiller_with(Mine=Returns({"loss_a": 1.0, "loss_b": 1.0, "loss_c": 0.0}, names=["loss_a"]))
    with pytest.raises(UserError, match="Mine does not return loss_b, although the weight is not 0; return"):
        forward(model, batch())

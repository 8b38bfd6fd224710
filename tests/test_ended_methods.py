"""What happens after a schedule's end: methods and teacher stop, and the training does not notice."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.errors import UserError
from d2_distill.methods import DistillMethod
from d2_distill.methods.schedules import build_schedule

from .engine.test_listing import R_CNN_ASSISTANT
from .methods.test_terms import Returns, distiller_with
from .small_detectors import SavedTeacher, batch, save_teacher
from .test_distiller import build_distiller

STOP_AT_1 = [["EarlyStop", 1]]
# Methods without trained parts: (student, teacher, method, overrides, its node).
WITHOUT_ADAPTERS = [
    ("RetinaNet", "RetinaNet", "PKD", {}, "PKD"),
    ("RetinaNet", "RetinaNet", "CrossKD", {}, "CROSSKD"),
    ("RetinaNet BN", "RetinaNet", "CrossKD", {}, "CROSSKD"),
    ("RetinaNet", "RetinaNet", "MSAD", {}, "MSAD"),
    ("GFL", "GFL", "LD", {"DISTILL__LD__VLR_KD__WEIGHT": 1.0}, "LD"),
    ("GeneralizedRCNN", "GeneralizedRCNN", "CrossKDRoI", {}, "CROSSKD_ROI"),
    ("GFL", "GFL", "FeatureImitation", {"DISTILL__IMITATION__ADAPTER": False}, "IMITATION"),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, SavedTeacher]:
    cases = ("RetinaNet", "GFL", "GeneralizedRCNN")
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in cases}


def scheduled(node: str, spec) -> dict[str, object]:
    return {f"DISTILL__{node}__SCHEDULE": spec}


class Training:
    """SGD with clipped gradients by the trainer's iteration; every step starts from a random state of its own."""

    def __init__(self, model, start: int = 0) -> None:
        self.model, self.start = model, start
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        # Of each step: losses, weights of terms with a schedule, calls of the teacher's backbone.
        self.losses: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, float]] = []
        self.teacher_calls: list[int] = []
        if model.teacher is not None:
            model.teacher.model.backbone.register_forward_hook(self._count)

    def _count(self, *args) -> None:
        self.teacher_calls[-1] += 1

    def run(self, stop: int) -> "Training":
        for iteration in range(self.start, stop):
            self.teacher_calls.append(0)
            torch.manual_seed(iteration)
            with EventStorage(iteration) as storage:
                losses = self.model(batch(seed=iteration))
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses.append(losses)
            scalars = {name.partition("/")[::2]: value for name, (value, _) in storage.latest().items()}
            self.weights.append({name: value for (group, name), value in scalars.items() if group == "distill_weight"})
        return self

    def values(self) -> list[dict[str, float]]:
        return [{name: loss.item() for name, loss in losses.items()} for losses in self.losses]


def assert_equal_states(a, b) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Before and after the end.


@pytest.mark.parametrize("case, teacher, method, overrides, node", WITHOUT_ADAPTERS)
def test_the_end_skips_method_and_teacher_and_changes_no_bit(
    case, teacher, method, overrides, node, teachers, monkeypatch
):
    def training():
        model = build_distiller(case, teachers[teacher], [method], **overrides, **scheduled(node, STOP_AT_1))
        return Training(model).run(4)

    found = training()
    assert found.teacher_calls == [1, 1, 0, 0]
    terms = list(found.model.methods[method].weights)
    for losses in found.losses[2:]:
        assert set(losses) == set(found.losses[0])  # so the logs go on
        assert all(losses[term] == 0 and not losses[term].requires_grad for term in terms)
    weights = {term.replace("loss_", "", 1): weight for term, weight in found.model.methods[method].weights.items()}
    assert found.weights == [weights] * 2 + [dict.fromkeys(weights, 0.0)] * 2

    monkeypatch.setattr(DistillMethod, "has_ended", lambda self, iteration: False)
    expected = training()
    assert expected.teacher_calls == [1, 1, 1, 1]
    assert expected.values() == found.values() and expected.weights == found.weights
    assert_equal_states(expected.model, found.model)


def test_a_warm_up_that_starts_at_0_is_not_an_end(teachers):
    schedule = scheduled("PKD", [["Warmup", 2], ["EarlyStop", 3]])
    training = Training(build_distiller("RetinaNet", teachers["RetinaNet"], ["PKD"], **schedule)).run(6)
    assert training.teacher_calls == [1, 1, 1, 1, 0, 0]
    assert [weights["pkd"] for weights in training.weights] == [0.0, 1.0, 2.0, 2.0, 0.0, 0.0]
    assert training.losses[0]["loss_pkd"].requires_grad


def test_adapters_get_their_gradients_after_the_end(teachers):
    """Several processes wait for them, so the teacher goes on as well."""
    schedules = {**scheduled("IMITATION", STOP_AT_1), **scheduled("PKD", STOP_AT_1)}
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["PKD", "FeatureImitation"], **schedules)
    training = Training(model).run(3)
    assert training.teacher_calls == [1, 1, 1]
    last = training.losses[-1]
    assert last["loss_imitation"] == 0 and last["loss_imitation"].requires_grad and not last["loss_pkd"].requires_grad
    assert all(p.grad is not None and not p.grad.any() for p in model.methods.parameters())
    model.methods.requires_grad_(False)
    assert Training(model, start=3).run(4).teacher_calls == [0]


def test_of_two_methods_one_has_ended(teachers):
    """What the other reads of the teacher is computed, and no more; taps that nobody reads are not kept."""
    schedules = scheduled("CROSSKD", STOP_AT_1)
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **schedules)
    heads, taps, run = [], [], model.staged.run
    model.teacher.model.head.cls_subnet[0].register_forward_hook(lambda *args: heads.append(model.teacher))
    model.staged.run = lambda *args, **kwargs: (taps.append(kwargs["taps"]), run(*args, **kwargs))[1]
    training = Training(model).run(2)
    assert len(heads) == 2 * 3 and [set(wanted) for wanted in taps] == [{"cls", "box"}] * 2  # three levels
    training = Training(model, start=2).run(4)
    assert len(heads) == 2 * 3 and taps[2:] == [{}, {}] and training.teacher_calls == [1, 1]
    assert all(losses["loss_pkd"] > 0 == losses["loss_crosskd_cls"] for losses in training.losses)


def test_no_teacher_for_methods_that_do_not_read_it(teachers):
    options = {**R_CNN_ASSISTANT, **scheduled("PKD", STOP_AT_1)}
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["TFHEAD", "PKD"], **options)
    training = Training(model).run(2)
    model.teacher.run = None  # whoever calls it fails
    training = Training(model, start=2).run(3)
    assert training.losses[0]["loss_assist_rcnn"] > 0 == training.losses[0]["loss_pkd"]


def test_head_reads_the_teacher_for_its_imitations_only(teachers):
    for weight in (0.0, 2.0):
        keys = {f"DISTILL__HEAD__{part}_WEIGHT": weight for part in ("AKD", "CKD")}
        model = build_distiller("RetinaNet", teachers["GeneralizedRCNN"], ["HEAD"], **keys)
        assert Training(model).run(1).teacher_calls == [int(weight > 0)]


# Logs and other reports.


def messages(model, caplog, iterations) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="d2_distill.distiller"):
        for iteration in iterations:
            with EventStorage(iteration):
                model(batch())
    return [record.getMessage() for record in caplog.records if "skipping" in record.msg]


def test_the_log_tells_the_end_once(teachers, caplog):
    schedules = {**scheduled("CROSSKD", STOP_AT_1), **scheduled("PKD", [["Decay", 3]])}
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **schedules)
    over = "from here on, because the schedules of all terms are over"
    assert messages(model, caplog, range(5)) == [
        f"Iteration 2: skipping CrossKD {over}.", f"Iteration 3: skipping PKD {over}; the teacher no longer runs.",
    ]
    resumed = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **schedules)
    [message] = messages(resumed, caplog, [7, 8])
    assert message == f"Iteration 7: skipping CrossKD, PKD {over}; the teacher no longer runs."


def test_without_a_teacher_the_log_does_not_mention_one(caplog):
    method = Returns({"loss_mine": 1.0})
    method.schedules, method.reads_teacher = {"loss_mine": build_schedule(STOP_AT_1)}, False
    [message] = messages(distiller_with(Mine=method), caplog, range(4))
    assert message == "Iteration 2: skipping Mine from here on, because the schedules of all terms are over."
    assert method.calls == 2


def test_gradient_ratios_leave_ended_methods_out(teachers):
    options = {"DISTILL__GRADIENT_RATIO_PERIOD": 1, **scheduled("CROSSKD", STOP_AT_1)}
    model = build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **options)
    found = {}
    for iteration in (1, 2):
        with EventStorage(iteration) as storage:
            model(batch())
        found[iteration] = {name for name in storage.latest() if name.startswith("grad_ratio/")}
    assert found[1] == {"grad_ratio/crosskd_cls", "grad_ratio/crosskd_box", "grad_ratio/pkd"}
    assert found[2] == {"grad_ratio/pkd"}


def test_a_term_with_the_name_of_a_students_loss_is_refused_after_its_end(caplog):
    method = Returns({"loss_cls": 1.0})
    method.schedules = {"loss_cls": build_schedule(STOP_AT_1)}
    with pytest.raises(UserError, match="the term loss_cls of Mine has the name"):
        messages(distiller_with(Mine=method), caplog, [5])


# Resumed runs.


@pytest.mark.parametrize("resumed_at", [1, 2, 3])
def test_resumed_around_the_end(resumed_at, teachers):
    """The last iteration that counts is 1."""
    schedules = {**scheduled("CROSSKD", STOP_AT_1), **scheduled("PKD", STOP_AT_1)}

    def model():
        return build_distiller("RetinaNet", teachers["RetinaNet"], ["CrossKD", "PKD"], **schedules)

    whole = Training(model()).run(4)
    first = Training(model()).run(resumed_at)
    second = Training(model(), start=resumed_at)
    second.model.load_state_dict(first.model.state_dict())
    second.model.student.loss_normalizer = first.model.student.loss_normalizer  # as engine/hooks.py saves it
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.run(4)
    assert first.values() + second.values() == whole.values()
    assert first.teacher_calls + second.teacher_calls == whole.teacher_calls == [1, 1, 0, 0]
    assert_equal_states(second.model, whole.model)

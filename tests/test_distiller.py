"""The distiller's promises: whose checkpoints it writes, what teachers may not do, what zero weights mean."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.data.registration import register_datasets
from d2_distill.detectors.building import build_detector, plain_config
from d2_distill.distiller import CHECKED_STEPS, Distiller
from d2_distill.engine.evaluate import evaluate, load_detector
from d2_distill.engine.trainer import build_checkpointer
from d2_distill.errors import UserError
from d2_distill.methods import DistillMethod
from d2_distill.methods.schedules import build_schedule

from .data.small_sets import write_coco
from .small_detectors import (
    CASES,
    RETINANETS,
    SavedTeacher,
    allowed_methods,
    batch,
    build,
    detector_cfg,
    distiller_cfg,
    image_input,
    save_teacher,
)

METHODS = ["CrossKD", "FeatureImitation", "PKD"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers by case."""
    cases = ("RetinaNet", "GeneralizedRCNN")
    return {case: save_teacher(tmp_path_factory.mktemp("teacher"), case) for case in cases}


@pytest.fixture
def teacher(teachers) -> SavedTeacher:
    return teachers["RetinaNet"]


def build_distiller(case, teacher, methods=(), **overrides) -> Distiller:
    torch.manual_seed(0)
    return build_model(distiller_cfg(case, teacher, methods, **overrides)).prepare_training().train()


def forward(model, inputs, iteration: int = 0):
    """Losses of a training step, from a fixed random state."""
    torch.manual_seed(5)
    with EventStorage(iteration):
        return model(inputs)


def train(model, steps: int = 3):
    """Plain SGD from a fixed random state; the losses of every step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    history = []
    torch.manual_seed(5)
    with EventStorage():
        for step in range(steps):
            losses = model(batch(seed=step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
    return history


# 1. A distilled checkpoint is a student checkpoint.


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_is_the_students(case, teachers, tmp_path):
    model = build_distiller(case, teachers["GeneralizedRCNN"], ["FeatureImitation"])
    train(model, steps=1)
    build_checkpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert {name.split(".")[0] for name in saved["distill"]} == {"FeatureImitation"}

    plain = build_model(plain_config(distiller_cfg(case, None)))
    assert type(plain).__name__ == case.split()[0] and list(saved["model"]) == list(plain.state_dict())
    plain.load_state_dict(saved["model"], strict=True)
    trained = model.student.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in plain.state_dict().items())


def test_checkpoint_restores_adapters(teacher, tmp_path):
    model = build_distiller("RetinaNet", teacher, ["FeatureImitation", "PKD"])
    train(model, steps=1)
    build_checkpointer(model, str(tmp_path)).save("model")
    other = build_distiller("RetinaNet", teacher, ["FeatureImitation", "PKD"])
    build_checkpointer(other, str(tmp_path)).load(str(tmp_path / "model.pth"))
    for ours, theirs in ((model.student, other.student), (model.methods, other.methods)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_no_adapters_no_extra_key(teacher, tmp_path):
    build_checkpointer(build_distiller("RetinaNet", teacher, ["CrossKD", "PKD"]), str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(saved) == ["model", "teacher"] and list(saved["teacher"]) == ["fingerprint"]


def test_state_dict_is_the_students(teacher, tmp_path):
    """So any checkpointer writes and reads the plain student, also around a wrapper such as DDP."""
    model = build_distiller("RetinaNet", teacher, ["FeatureImitation"])
    assert list(model.methods.state_dict()) and list(model.state_dict()) == list(model.student.state_dict())
    wrapped = nn.DataParallel(model)
    assert set(wrapped.state_dict()) == {f"module.{name}" for name in model.student.state_dict()}
    plain = build(detector_cfg("RetinaNet"), salt=3)
    DetectionCheckpointer(plain, str(tmp_path)).save("plain")
    DetectionCheckpointer(wrapped, str(tmp_path)).load(str(tmp_path / "plain.pth"))
    assert all(torch.equal(value, model.student.state_dict()[name]) for name, value in plain.state_dict().items())
    DetectionCheckpointer(wrapped, str(tmp_path)).save("distilled")
    saved = torch.load(tmp_path / "distilled.pth", weights_only=True)["model"]
    plain.load_state_dict(saved, strict=True)
    bias = saved["head.cls_score.bias"]
    found = model.load_state_dict({"head.cls_score.bias": bias, "more": bias}, strict=False)
    assert found.unexpected_keys == ["more"] and "head.cls_score.weight" in found.missing_keys


def test_weights_of_other_classes_are_skipped(teacher, tmp_path, caplog):
    """As with a plain detector: Detectron2 loads what fits, and names the rest."""
    other = build(detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=5), salt=3)
    DetectionCheckpointer(other, str(tmp_path)).save("other")
    model = build_model(distiller_cfg("RetinaNet", teacher))
    before = model.student.head.cls_score.weight.clone()
    DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))
    assert torch.equal(model.student.head.cls_score.weight, before)
    assert torch.equal(model.student.head.bbox_pred.weight, other.head.bbox_pred.weight)
    with pytest.raises(AttributeError, match="no_such_module"):
        model.no_such_module


# 2. The teacher is a guest.


def test_teacher_is_outside_the_module_tree(teacher):
    model = build_distiller("RetinaNet", teacher, METHODS)
    guest = model.teacher.model
    mine, theirs = ({id(x) for x in (*m.modules(), *m.parameters(), *m.buffers())} for m in (model, guest))
    assert not mine & theirs
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student", "methods"}
    assert len(list(model.parameters())) == len(list(model.student.parameters())) + 6


def test_teacher_stays_as_it_is(teacher):
    model = build_distiller("RetinaNet BN", teacher, METHODS)
    guest = model.teacher.model
    before, fingerprint = copy.deepcopy(guest.state_dict()), model.teacher.fingerprint()
    student_before = copy.deepcopy(model.student.state_dict())
    model.eval()
    model.train()
    train(model, steps=3)
    assert not any(module.training for module in guest.modules())
    assert all(p.grad is None and not p.requires_grad for p in guest.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guest.state_dict().items())
    assert model.teacher.fingerprint() == fingerprint
    assert not torch.equal(model.student.head.cls_score.weight, student_before["head.cls_score.weight"])


def test_fingerprint_tells_any_change(teacher):
    guest = build_distiller("RetinaNet", teacher).teacher
    before = guest.fingerprint()
    assert len(before) == 16 and before == build_distiller("RetinaNet", teacher).teacher.fingerprint()
    guest.model.head.cls_score.bias[0] += 1e-6
    assert guest.fingerprint() != before


def test_gradient_flows_through_the_teacher(teacher):
    """CrossKD: the teacher's layers lie between the loss and the student, and get no gradient themselves."""
    model = build_distiller("RetinaNet", teacher, ["CrossKD"])
    losses = forward(model, batch())
    (losses["loss_crosskd_cls"] + losses["loss_crosskd_box"]).backward()
    head = model.student.head
    assert head.cls_subnet[0].weight.grad.any() and head.bbox_subnet[0].weight.grad.any()
    assert head.cls_score.weight.grad is None and head.bbox_pred.weight.grad is None
    assert all(p.grad is None for p in model.teacher.model.parameters())


# 3. No silent teacher.


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda state: state.pop("head.cls_score.bias"), "1 missing: head.cls_score.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda state: state.update({"head.cls_score.bias": torch.zeros(7)}),
            r"1 mis-shaped: head.cls_score.bias \(7,\) \(model: \(18,\)\)",
        ),
    ],
)
def test_teacher_weights_must_fit(teacher, tmp_path, change, expected):
    state = torch.load(teacher.weights, weights_only=True)["model"]
    change(state)
    torch.save({"model": state}, tmp_path / "other.pth")
    broken = SavedTeacher(teacher.config_file, str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=rf"MODEL.DISTILL.TEACHER.WEIGHTS: .*other.pth .*\({expected}\)\."):
        build_distiller("RetinaNet", broken)


def test_fingerprint_is_logged(teacher, caplog):
    # Detectron2's logging setup, which another test may have called, stops the records on their way up.
    logger = logging.getLogger("d2_distill.teacher")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    model = build_distiller("RetinaNet", teacher)
    logger.removeHandler(caplog.handler)
    line = next(record.getMessage() for record in caplog.records if record.name == logger.name)
    assert "Teacher: RetinaNet" in line and teacher.weights in line and model.teacher.fingerprint() in line


class GivenTerm(DistillMethod):
    """Loss term by a function of the student's run."""

    def __init__(self, compute) -> None:
        super().__init__(weights={"loss_given": 1.0}, schedule=build_schedule([]))
        self.compute = compute
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher):
        return {"loss_given": self.scale * self.compute(student)}


def with_given_term(compute) -> Distiller:
    methods = nn.ModuleDict({"Given": GivenTerm(compute)})
    student = build(detector_cfg("RetinaNet")).train()
    return Distiller(student=student, teacher=None, methods=methods, input_format="BGR")


@pytest.mark.parametrize(
    "compute, message",
    [
        (lambda run: run.features["p3"].sum() * float("nan"), "Given gives loss_given = nan in the first"),
        (lambda run: run.features["p3"].sum() / 0, "Given gives loss_given = (inf|-inf|nan)"),
        (lambda run: run.features["p3"].detach().sum(), "gradient of Given's loss_given does not reach"),
        (lambda run: run.features["p3"].mean().item(), "gradient of Given's loss_given does not reach"),
    ],
)
def test_first_steps_check_every_term(compute, message):
    with pytest.raises(UserError, match=message):
        forward(with_given_term(compute), batch())


def test_later_steps_are_not_checked():
    """The check waits for the device, so it ends after the first steps."""
    factors = iter([1.0] * CHECKED_STEPS + [float("nan")])
    model = with_given_term(lambda run: run.features["p3"].sum() * next(factors))
    found = [forward(model, batch())["loss_given"].isfinite().item() for _ in range(CHECKED_STEPS + 1)]
    assert found == [True] * CHECKED_STEPS + [False]


# 4. With all weights 0, or without methods, training is plain training, bit by bit.


@pytest.mark.parametrize("with_methods", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_zero_are_plain_training(case, with_methods, teacher):
    keys = ("CROSSKD__CLS_WEIGHT", "CROSSKD__BOX_WEIGHT", "PKD__WEIGHT", "IMITATION__WEIGHT")
    keys += ("HEAD__ASSIST_WEIGHT", "HEAD__AKD_WEIGHT", "HEAD__CKD_WEIGHT")
    zeros = {f"DISTILL__{key}": 0.0 for key in keys}
    plain = build(detector_cfg(case)).train()
    random_state = torch.get_rng_state()
    methods = allowed_methods(case, "RetinaNet") if with_methods else ()
    model = build_distiller(case, teacher if with_methods else None, methods, **zeros)
    assert torch.equal(torch.get_rng_state(), random_state) and not list(model.methods.parameters())
    assert train(model) == train(plain)
    for (name, value), ours in zip(plain.state_dict().items(), model.student.state_dict().values()):
        assert torch.equal(ours, value), name


def test_student_starts_as_the_plain_one(teacher):
    """Also with adapters, whose initialisation draws random numbers."""
    plain = build(detector_cfg("FCOS"))
    random_state = torch.get_rng_state()
    model = build_distiller("FCOS", teacher, ["FeatureImitation"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.student.parameters()))
    expected, losses = forward(plain.train(), batch()), forward(model, batch())
    assert set(losses) - set(expected) == {"loss_imitation"}
    assert all(torch.equal(losses[name], value) for name, value in expected.items())


# 5. Losses keep their scale when the batch grows.


def test_terms_do_not_depend_on_the_batch_size(teacher):
    model = build_distiller("RetinaNet", teacher, METHODS, DISTILL__PKD__IN_FEATURES=("p3",))
    single, double = forward(model, batch()), forward(model, batch() + batch())
    for term in ("loss_crosskd_cls", "loss_crosskd_box", "loss_imitation"):
        torch.testing.assert_close(double[term], single[term], rtol=2e-4, atol=0)
    # Pearson's is exact but for the unbiased deviation: a factor (n - 1) / n for n values a channel.
    n = 2 * (96 // 8) ** 2
    factor = (2 * n - 1) / (2 * n) / ((n - 1) / n)
    torch.testing.assert_close(double["loss_pkd"], single["loss_pkd"] * factor, rtol=1e-4, atol=0)


# 6. No parameter lacks a gradient: DDP needs no find_unused_parameters.


@pytest.mark.parametrize("teacher_case", ["RetinaNet", "GeneralizedRCNN"])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case, teacher_case, teachers):
    methods = allowed_methods(case, teacher_case)
    for names in [[name] for name in methods] + [methods]:
        model = build_distiller(case, teachers[teacher_case], names)
        losses = forward(model, batch())
        sum(losses.values()).backward()
        assert len(losses) > len(names) and all(loss.isfinite() for loss in losses.values())
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without and list(model.methods) == names


# 7. Schedules follow the trainer's iteration.


def test_schedules_follow_the_trainers_iteration(teacher):
    schedules = {"DISTILL__PKD__SCHEDULE": [["Warmup", 10]], "DISTILL__CROSSKD__SCHEDULE": [["EarlyStop", 4]]}
    model = build_distiller("RetinaNet", teacher, METHODS, **schedules)
    at = {iteration: forward(model, batch(), iteration) for iteration in (0, 4, 5, 10, 99)}
    pkd = torch.stack([losses["loss_pkd"] for losses in at.values()])
    torch.testing.assert_close(pkd / pkd[-1], torch.tensor([0, 0.4, 0.5, 1, 1]))
    assert at[4]["loss_crosskd_cls"] == at[0]["loss_crosskd_cls"] > 0
    assert at[5]["loss_crosskd_cls"] == at[99]["loss_crosskd_box"] == 0
    assert at[0]["loss_imitation"] == at[99]["loss_imitation"] > 0


def test_weights_with_a_schedule_are_scalars(teacher):
    schedules = {"DISTILL__PKD__SCHEDULE": [["Warmup", 10]], "DISTILL__PKD__WEIGHT": 3.0}
    model = build_distiller("RetinaNet", teacher, METHODS, **schedules)
    with EventStorage(5) as storage:
        model(batch())
    weights = {name: value for name, value in storage.latest().items() if name.startswith("distill_weight")}
    assert weights == {"distill_weight/pkd": (1.5, 5)}


# 8. Evaluation never sees a teacher.


def test_evaluation_builds_no_teacher(tmp_path):
    missing = SavedTeacher(str(tmp_path / "missing.yaml"), str(tmp_path / "missing.pth"))
    row = write_coco(tmp_path, classes=("cat", "cow", "dog"))
    cfg = distiller_cfg("RetinaNet", missing, METHODS)
    cfg.merge_from_list(["DATASETS.COCO", (row,), "DATASETS.TEST", (row[0],), "DATALOADER.NUM_WORKERS", 0])
    cfg.INPUT.MIN_SIZE_TEST, cfg.OUTPUT_DIR = 32, str(tmp_path)
    with pytest.raises(UserError, match="no file .*missing.yaml"):
        build_model(cfg).prepare_training()

    assert len(build_model(cfg).eval()(batch())) == len(batch())
    register_datasets(cfg)
    DetectionCheckpointer(build_detector(cfg), str(tmp_path)).save("student")
    cfg.MODEL.WEIGHTS = str(tmp_path / "student.pth")
    model = load_detector(cfg)
    assert type(model).__name__ == "RetinaNet" and "AP" in evaluate(cfg, model)["bbox"]


def test_distiller_in_evaluation_is_the_student(teacher):
    model = build_distiller("FCOS", teacher, ["PKD"]).eval()
    model.teacher.run = None  # whoever calls it fails
    plain = build(detector_cfg("FCOS")).eval()
    for ours, theirs in zip(model(batch()), plain(batch())):
        assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)


# A trainer that does not know of a teacher, such as Detectron2's.


def test_first_step_builds_teacher_and_methods(teacher):
    cfg = distiller_cfg("RetinaNet", teacher, ["CrossKD", "PKD"], DISTILL__INHERIT=("head.cls_subnet",))
    models = []
    for prepared in (True, False):
        torch.manual_seed(0)
        models.append(build_model(cfg).prepare_training() if prepared else build_model(cfg))
    known, unknown = models
    assert unknown.teacher is None and not unknown.methods and known.methods
    random_state = torch.get_rng_state()
    expected = train(known, steps=1)
    torch.set_rng_state(random_state)
    assert train(unknown, steps=1) == expected and unknown.teacher.fingerprint() == known.teacher.fingerprint()
    assert all(torch.equal(value, unknown.state_dict()[name]) for name, value in known.state_dict().items())


def test_first_step_of_a_resumed_run_inherits_nothing(teacher):
    model = build_model(distiller_cfg("RetinaNet", teacher, ["PKD"], DISTILL__INHERIT=("head",)))
    before = copy.deepcopy(model.student.head.state_dict())
    forward(model, batch(), iteration=7)
    assert all(torch.equal(value, before[name]) for name, value in model.student.head.state_dict().items())


def test_first_step_refuses_layers_that_nobody_trains(teacher):
    model = build_model(distiller_cfg("RetinaNet", teacher, METHODS))
    for _ in range(2):
        with pytest.raises(UserError, match="METHODS: FeatureImitation trains layers .* d2_distill.engine.Trainer"):
            forward(model, batch())
    assert forward(model.prepare_training(), batch())["loss_imitation"] > 0


# 10. Methods add up.


def test_methods_add_up(teacher):
    together = forward(build_distiller("RetinaNet", teacher, METHODS), batch())
    apart = [forward(build_distiller("RetinaNet", teacher, [name]), batch()) for name in ("CrossKD", "PKD")]
    plain = forward(build(detector_cfg("RetinaNet")).train(), batch())
    terms = {name: value for losses in apart for name, value in losses.items() if name not in plain}
    assert set(together) == {*plain, *terms, "loss_imitation"} and len(together) == len(plain) + 4
    assert all(torch.equal(together[name], value) for name, value in {**plain, **terms}.items())
    # FeatureImitation's adapters depend on the random numbers before them: give both the same.
    model = build_distiller("RetinaNet", teacher, METHODS)
    alone = build_distiller("RetinaNet", teacher, ["FeatureImitation"])
    alone.methods.load_state_dict(model.methods.state_dict())
    assert torch.equal(forward(alone, batch())["loss_imitation"], forward(model, batch())["loss_imitation"])


def test_weights_scale_their_terms(teacher):
    base = forward(build_distiller("RetinaNet", teacher, METHODS), batch())
    weights = {
        "DISTILL__CROSSKD__CLS_WEIGHT": 3.0,
        "DISTILL__CROSSKD__BOX_WEIGHT": 0.0,
        "DISTILL__PKD__WEIGHT": 1.0,
        "DISTILL__IMITATION__WEIGHT": 0.5,
    }
    losses = forward(build_distiller("RetinaNet", teacher, METHODS, **weights), batch())
    assert set(base) - set(losses) == {"loss_crosskd_box"}
    for term, factor in (("loss_crosskd_cls", 3), ("loss_pkd", 0.5), ("loss_imitation", 0.5)):
        torch.testing.assert_close(losses[term], base[term] * factor)


# Inheritance of the teacher's modules.


def test_inherit_copies_modules(teacher):
    model = build_distiller("RetinaNet", teacher, DISTILL__INHERIT=("head.cls_subnet", "head.cls_score"))
    ours, theirs = model.student.state_dict(), model.teacher.model.state_dict()
    plain = build(detector_cfg("RetinaNet")).state_dict()
    for name, value in ours.items():
        inherited = name.startswith(("head.cls_subnet.", "head.cls_score."))
        assert torch.equal(value, theirs[name] if inherited else plain[name]), name
        assert value.data_ptr() != theirs[name].data_ptr()
    assert model.student.head.cls_score.weight.requires_grad
    train(model, steps=1)
    assert not torch.equal(model.student.head.cls_score.weight, model.teacher.model.head.cls_score.weight)


@pytest.mark.parametrize(
    "prefix, overrides, message",
    [
        ("header", {}, "'header', which is no module with weights in the student; .*backbone, head"),
        ("head", {"RETINANET__NUM_CLASSES": 5}, r"cls_score.weight is \(30, .*student and \(18, .*teacher"),
        ("head", {"RETINANET__NUM_CONVS": 3}, r"cls_subnet.4.weight is \(32, .* in the student and missing"),
    ],
)
def test_inherit_needs_equal_modules(teacher, prefix, overrides, message):
    with pytest.raises(UserError, match=message):
        build_distiller("RetinaNet", teacher, DISTILL__INHERIT=(prefix,), **overrides)


def test_inherit_needs_a_teacher():
    with pytest.raises(UserError, match="MODEL.DISTILL.INHERIT needs a teacher"):
        build_distiller("RetinaNet", None, DISTILL__INHERIT=("head",))


def test_images_without_objects(teacher):
    """A batch without any box trains on; every term stays finite."""
    model = build_distiller("RetinaNet", teacher, METHODS)
    losses = forward(model, [image_input(64, 96), image_input(96, 64, seed=1)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", RETINANETS)
def test_student_named_by_the_config(case, teacher):
    assert type(build_distiller(case, teacher).student).__name__ == case.split()[0]


@pytest.mark.parametrize("name", ["Unknown", "Distiller"])
def test_unknown_student(name):
    with pytest.raises(UserError, match=f"MODEL.DISTILL.STUDENT is '{name}', which is no detector;.*FCOS"):
        build_distiller("RetinaNet", None, DISTILL__STUDENT=name)

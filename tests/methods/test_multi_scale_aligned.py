"""MSAD: low-resolution students, what they start with, and what they learn."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.detectors.building import build_detector
from d2_distill.distiller import Distiller
from d2_distill.engine.trainer import Trainer, build_checkpointer
from d2_distill.errors import UserError
from d2_distill.methods import MSAD
from d2_distill.staged import stage_detector

from ..low_resolution_pairs import INHERIT, of_student, of_teacher
from ..same_detections import assert_same_detections
from ..small_detectors import (
    SavedTeacher,
    batch,
    build,
    detector_cfg,
    distiller_cfg,
    image_input,
    save_teacher,
)

FCOS = "OpenMMLabFCOS"
PAIRS = [(FCOS, 2), (FCOS, 4), ("RetinaNet", 2), ("RetinaNet", 4), ("GFL", 2), ("GFL", 4), ("TOOD", 2)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers by detector and factor, made when they are first asked for."""
    saved = {}

    def teacher(detector: str = FCOS, factor: int = 2) -> SavedTeacher:
        if (detector, factor) not in saved:
            folder = tmp_path_factory.mktemp("teacher")
            overrides = of_teacher(detector, factor)
            saved[detector, factor] = save_teacher(folder, "MultiScaleDetector", **overrides)
        return saved[detector, factor]

    return teacher


def student_cfg(teacher, case=FCOS, factor=2, methods=("MSAD",), **overrides) -> CfgNode:
    values = {**of_student(factor), "DISTILL__INHERIT": INHERIT, **overrides}
    return distiller_cfg(case, teacher, methods, **values)


def distiller(*args, **kwargs) -> Distiller:
    torch.manual_seed(0)
    return build_model(student_cfg(*args, **kwargs)).prepare_training().train()


def step(model, inputs=None, iteration: int = 0):
    with EventStorage(iteration) as storage:
        losses = model(inputs or batch())
    return losses, storage


def runs_of(model):
    """Runs of student and teacher on the same batch."""
    inputs = batch()
    images, gt_instances = model.staged.preprocess(inputs), [x["instances"] for x in inputs]
    student = model.staged.run(images, gt_instances)
    return student, model.teacher.staged.run(images, gt_instances, frozen=True)


# The term.


def test_term_is_the_sum_over_levels_of_the_mean_difference(teachers):
    model = distiller(teachers())
    student, teacher = runs_of(model)
    expected = 0.0
    for name in ("p3", "p4", "p5", "p6"):
        ours, theirs = (run.features[name].detach().double().flatten().tolist() for run in (student, teacher))
        expected += sum(abs(a - b) for a, b in zip(ours, theirs)) / len(ours)
    with EventStorage() as storage:
        terms = model.methods["MSAD"](student, teacher)
        assert storage.latest()["msad/raw"][0] == pytest.approx(expected, rel=1e-5)
    assert set(terms) == {"loss_msad"} and terms["loss_msad"].item() == pytest.approx(expected, rel=1e-5)


def test_the_teachers_maps_are_the_fused_ones(teachers):
    model = distiller(teachers())
    _, teacher = runs_of(model)
    guest = model.teacher.model
    high, low = guest.high(teacher.images.tensor), guest.low(teacher.images.tensor)
    for name, fused in teacher.features.items():
        torch.testing.assert_close(fused, guest.fusion(high[name], low[name]).detach())
        assert not fused.requires_grad and not torch.equal(fused, low[name])


def test_gradient_of_the_term_is_a_sign(teachers):
    """Of each entry: the sign of the difference over their number; 0 where there is none."""
    model = distiller(teachers())
    student, teacher = runs_of(model)
    with EventStorage():
        loss = model.methods["MSAD"](student, teacher)["loss_msad"]
    for name, gradient in zip(student.features, torch.autograd.grad(loss, list(student.features.values()))):
        difference = student.features[name].detach() - teacher.features[name]
        torch.testing.assert_close(gradient, difference.sign() / difference.numel())


def test_weight_rises_with_the_trainers_iteration(teachers):
    model = distiller(teachers(), DISTILL__MSAD__SCHEDULE=[["Warmup", 500]])
    at = {iteration: step(model, iteration=iteration) for iteration in (0, 125, 500, 2000)}
    raw = at[0][1].latest()["msad/raw"][0]
    found = [losses["loss_msad"].item() for losses, _ in at.values()]
    assert raw > 0 and found == pytest.approx([0, 0.15 * raw, 0.6 * raw, 0.6 * raw])


def test_chosen_levels(teachers):
    model = distiller(teachers(), DISTILL__MSAD__IN_FEATURES=("p4",))
    student, teacher = runs_of(model)
    with EventStorage():
        found = model.methods["MSAD"](student, teacher)["loss_msad"]
    torch.testing.assert_close(found, (student.features["p4"] - teacher.features["p4"]).abs().mean())


# Students of any kind.


@pytest.mark.parametrize("case, factor", PAIRS)
def test_every_parameter_gets_a_gradient(case, factor, teachers):
    model = distiller(teachers(case, factor), case, factor)
    guest, fingerprint = model.teacher.model, model.teacher.fingerprint()
    for inputs in (batch(), [image_input(64, 96), image_input(96, 64, seed=1)]):
        model.zero_grad()
        losses, _ = step(model, inputs, iteration=600)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values()) and losses["loss_msad"] > 0
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    assert all(p.grad is None for p in guest.parameters()) and model.teacher.fingerprint() == fingerprint


def test_any_pair_of_equal_strides_and_channels_can_be_taught(teachers):
    """Another head than the teacher's, so that nothing but the pyramid is inherited."""
    model = distiller(teachers(FCOS), "GFL", DISTILL__INHERIT=INHERIT[:1])
    losses, _ = step(model, iteration=500)
    assert losses["loss_msad"] > 0 and {"loss_cls", "loss_dfl"} < set(losses)


@pytest.mark.parametrize("methods", [("CrossKD", "PKD", "FeatureImitation", "LD")])
def test_every_method_learns_from_the_teacher(methods, teachers):
    model = distiller(teachers("GFL"), "GFL", methods=methods)
    losses, _ = step(model)
    terms = {"loss_crosskd_cls", "loss_crosskd_box", "loss_pkd", "loss_imitation", "loss_ld", "loss_ld_vlr"}
    found = {name: loss for name, loss in losses.items() if name in terms or "ld" in name or "kd" in name}
    assert len(found) >= 5 and all(loss.isfinite() for loss in found.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_channels_must_agree(teachers):
    with pytest.raises(UserError, match="MSAD compares channel by channel, .* 64 channels .*MODEL.FPN.OUT_CHANNELS"):
        distiller(teachers(), DISTILL__INHERIT=(), FPN__OUT_CHANNELS=64)


def test_sizes_must_agree(teachers):
    """A detector on whole images pads them less than the teacher does."""
    full = {**of_teacher(), "DISTILL__INHERIT": ()}
    model = distiller(teachers(), **full)
    message = r"student's p3 is of size \(12, 12\) and the teacher's p3 of \(16, 16\).*FACTOR"
    with pytest.raises(UserError, match=message):
        step(model, [image_input(80, 80)])


# What the student starts with.


def test_the_student_starts_with_the_teachers_weights(teachers, caplog):
    logger = logging.getLogger("d2_distill.distiller")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    model = distiller(teachers())
    logger.removeHandler(caplog.handler)
    [line] = {record.getMessage() for record in caplog.records if record.name == logger.name}
    assert model.teacher.fingerprint() in line and all(entry in line for entry in INHERIT)

    theirs = model.teacher.model.state_dict()
    for name, value in model.student.state_dict().items():
        source = f"detector.{name.replace('backbone.pyramid.', 'backbone.')}"
        assert torch.equal(value, theirs[source]) and value.data_ptr() != theirs[source].data_ptr(), name
    losses, _ = step(model)
    with EventStorage():
        of_teacher_ = copy.deepcopy(model.teacher.model).train()(batch())
    for name in ("loss_cls", "loss_box_reg", "loss_centerness"):
        torch.testing.assert_close(losses[name], of_teacher_[f"{name}_lr"])
    assert losses["loss_msad"] == 0


def test_inheritance_wins_over_the_first_weights_but_not_over_a_checkpoint(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [])
    other = build(detector_cfg(FCOS, **of_student()), salt=9)
    build_checkpointer(other, str(tmp_path)).save("other")
    cfg = student_cfg(teachers(), WEIGHTS=str(tmp_path / "other.pth"))
    cfg.OUTPUT_DIR = str(tmp_path / "out")

    def trained(resume: bool) -> tuple[Trainer, Distiller]:
        model = build_model(cfg)
        trainer = Trainer(cfg, model)
        trainer.resume_or_load(resume)
        return trainer, model

    (tmp_path / "out").mkdir()
    trainer, model = trained(resume=False)
    inherited = model.teacher.model.detector.head.cls_score.weight
    assert torch.equal(model.student.head.cls_score.weight, inherited)
    with torch.no_grad():
        model.student.head.cls_score.weight += 1
    build_checkpointer(model, cfg.OUTPUT_DIR, trainer=trainer).save("model_0000005", iteration=5)
    assert torch.equal(trained(resume=True)[1].student.head.cls_score.weight, inherited + 1)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            "head=detector.backbone",
            r"'head=detector.backbone', but head.* and missing in the teacher .detector.backbone.",
        ),
        ("backbone=detector.backbone", r"missing in the teacher .detector.backbone.pyramid."),
        ("tail=detector.head", "'tail', which is no module with weights in the student"),
    ],
)
def test_modules_must_be_equal(entry, message, teachers):
    with pytest.raises(UserError, match=message):
        distiller(teachers(), DISTILL__INHERIT=(entry,))


# The teacher's batch norms.


def test_batch_statistics_are_an_option(teachers):
    quiet, moved = distiller(teachers()), distiller(teachers(), DISTILL__TEACHER__BATCH_STATISTICS=True)
    before = copy.deepcopy(moved.teacher.model.state_dict())
    found = [step(model, iteration=500)[0]["loss_msad"] for model in (quiet, moved)]
    assert found[0] != found[1] and not moved.teacher.model.training
    after = moved.teacher.model.state_dict()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    expected = quiet.teacher.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in expected.items())


# The student alone.


def test_the_exported_student_needs_no_teacher(teachers, tmp_path):
    model = distiller(teachers())
    with torch.no_grad():
        model.student.head.cls_score.bias += 0.5
    build_checkpointer(model, str(tmp_path)).save("model")
    gone = SavedTeacher(str(tmp_path / "gone.yaml"), str(tmp_path / "gone.pth"))
    plain = build_detector(student_cfg(gone))
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(saved) == ["model", "teacher"] and not any("detector" in name or "fusion" in name for name in saved["model"])
    plain.load_state_dict(saved["model"], strict=True)
    inputs = [image_input(96, 128, seed=seed) for seed in range(3)]
    with torch.no_grad():
        ours, theirs = plain.eval()(inputs), model.eval()(inputs)
        single = [plain([each])[0] for each in inputs]
    assert len(ours) == 3
    for a, b, c in zip(ours, theirs, single):
        a, b, c = a["instances"], b["instances"], c["instances"]
        assert len(a) > 0 and torch.equal(a.scores, b.scores)
        assert_same_detections(a, c)


def test_the_method_needs_a_teacher():
    student = stage_detector(build(detector_cfg(FCOS, **of_student())))
    with pytest.raises(UserError, match="MSAD needs a teacher"):
        MSAD.from_config(student_cfg(None), student, None)

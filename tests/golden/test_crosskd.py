"""Parity of losses, box coding, alignment and whole steps with numbers of the published CrossKD code."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from d2_distill import losses
from d2_distill.detectors.box_coders import TwoSidedBox2BoxTransform
from d2_distill.methods import PKD, CrossKD
from d2_distill.methods.pairing import pair_features
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import Tap, stage_detector

from . import openmmlab
from .cases import Case, case_names, load
from .dispatch import assert_close, assert_recorded, assert_recorded_gradient, run_check

SUITE = "crosskd"


def kind_of(case: Case) -> str:
    """The json's kind, refined by what decides which code is meant: the loss class, or the detector."""
    kind = case.data["kind"]
    if kind == "loss":
        return case.data["reference"].split("::")[1].split()[0]
    return f"{kind}_{case.data['detector']}" if "detector" in case.data else kind


def _kd_quality_focal(case, pred):
    targets = case.tensor("in.teacher_logits").sigmoid()
    loss = losses.quality_focal_loss(pred, targets, beta=case.data["options"]["beta"])
    return loss, case.tensor("in.weight")[:, None] if "in.weight" in case.arrays else None


def _quality_focal(case, pred):
    classes = F.one_hot(case.tensor("in.label"), case.data["options"]["num_classes"] + 1)[:, :-1]
    targets = classes * case.tensor("in.score")[:, None]
    loss = losses.quality_focal_loss(pred, targets, beta=case.data["options"]["beta"])
    return loss, case.tensor("in.weight")[:, None]


def _distribution_focal(case, pred):
    return losses.distribution_focal_loss(pred, case.tensor("in.label")), case.tensor("in.weight")


def _kd_kl_div(case, pred):
    options = case.data["options"]
    loss = losses.kd_kl_div_loss(
        pred,
        case.tensor("in.teacher_logits"),
        temperature=options["T"],
        class_reduction=options["class_reduction"],
    )
    return loss, case.tensor("in.weight")


def _giou(case, pred):
    return losses.giou_loss(pred, case.tensor("in.target"), eps=case.data["options"]["eps"]), case.tensor(
        "in.weight"
    )


def _log_iou(case, pred):
    return losses.log_iou_loss(pred, case.tensor("in.target")), case.tensor("in.weight")


def _focal(case, pred):
    options = case.data["options"]
    targets = F.one_hot(case.tensor("in.label"), options["num_classes"] + 1)[:, :-1].to(pred.dtype)
    loss = sigmoid_focal_loss(pred, targets, alpha=options["alpha"], gamma=options["gamma"], reduction="none")
    return loss, case.tensor("in.weight")[:, None]


def _centerness(case, pred):
    target = case.tensor("in.teacher_logits").sigmoid()
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none"), None


def check_loss(case: Case, elementwise) -> None:
    options = case.data["options"]
    pred = case.tensor("in.pred").requires_grad_()
    loss, weight = elementwise(case, pred)
    if options.get("avg_factor") is not None:
        loss = losses.weighted_mean(loss, weight, options["avg_factor"])
    else:
        loss = loss if weight is None else loss * weight
        loss = loss if options["reduction"] == "none" else loss.mean()
    loss = loss * options["loss_weight"]
    loss.sum().backward()
    assert_recorded(case, "out.loss", loss)
    assert_recorded(case, "out.grad_pred", pred.grad)


def check_pkd(case: Case) -> None:
    pred = case.tensor("in.pred").requires_grad_()
    loss = case.data["options"]["loss_weight"] * losses.pearson_loss(pred, case.tensor("in.teacher_feat"))
    loss.backward()
    if case.tensor("out.loss").isnan():
        assert case.data["informative"], "a nan is recorded only where the reference has no guard"
        assert loss == 0 and not pred.grad.any()
        return
    assert_recorded(case, "out.loss", loss)
    assert_recorded(case, "out.grad_pred", pred.grad)


def check_align(case: Case) -> None:
    student = case.tensor("in.student_feat").requires_grad_()
    aligned = losses.align_statistics(student, case.tensor("in.teacher_feat"))
    (aligned * case.tensor("in.cotangent")).sum().backward()
    assert_recorded(case, "out.aligned", aligned)
    assert_recorded_gradient(case, "out.grad_student_feat", student.grad)


def check_coder(case: Case) -> None:
    options = case.data["options"]
    coder = TwoSidedBox2BoxTransform(weights=tuple(1 / std for std in options["stds"]))
    anchors = case.tensor("in.anchors")
    assert_recorded(case, "out.boxes", coder.apply_deltas(case.tensor("in.deltas"), anchors))
    assert_recorded(case, "out.encoded_gt", coder.get_deltas(anchors, case.tensor("in.gt")))


def assert_labels(case: Case, student, maps, inputs) -> None:
    """Classes of all anchors are the recorded ones, and so are the ignored anchors."""
    assignment = student.assign(student.anchor_generator(maps), [item["instances"] for item in inputs])
    per_cell = student.anchor_generator.num_anchors[0]
    sizes = [tensor.shape[-2] * tensor.shape[-1] * per_cell for tensor in maps]
    for level, labels in enumerate(assignment.labels.split(sizes, dim=1)):
        recorded = case.tensor(f"mid.labels.{level}").long().view(labels.shape)
        if f"mid.label_weights.{level}" in case.arrays:  # FCOS, which ignores nothing, has none
            recorded[case.tensor(f"mid.label_weights.{level}") == 0] = -1
        recorded = openmmlab.labels_in_our_order(student, recorded)
        assert torch.equal(labels, recorded), f"{case.name}: labels of level {level}"
    assert assignment.foreground.sum() == sum(case.data["n_pos"])
    if "avg_factor" in case.data:
        assert assignment.normalizer == case.data["avg_factor"]


def gradients(total: torch.Tensor, case: Case, student, maps):
    """Gradients of the student's maps and of its parameters in the recorded order; zeros for none."""
    parameters = dict(student.named_parameters())
    names = [openmmlab.parameter_name(student, name) for name in case.data["student_param_order"]]
    assert set(names) == set(parameters)
    parameters = [parameters[name] for name in names]
    wanted = [*maps, *parameters]
    found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(wanted, found)]
    return found[: len(maps)], found[len(maps) :]


def norms(tensors) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors])


def assert_gradients(case: Case, total: torch.Tensor, student, maps) -> None:
    to_maps, to_parameters = gradients(total, case, student, maps)
    for level, gradient in enumerate(to_maps):
        assert_recorded_gradient(case, f"out.grad_total.student_feat.{level}", gradient)
    assert_recorded_gradient(case, "out.gradnorm_total.params", norms(to_parameters))


# Recorded entry -> our term; the others have the same name.
RECORDED_TERMS = {
    "loss_cls_kd": "loss_crosskd_cls",
    "loss_reg_kd": "loss_crosskd_box",
    "losses_center_kd": "loss_crosskd_centerness",
    "loss_feat_kd": "loss_pkd",
    "loss_bbox": "loss_box_reg",
}
RECORDED_OUTPUTS = {"cls": "logits", "reg": "deltas", "ctr": "centerness"}
RECORDED_BOX_LOSSES = {"GIoULoss": "giou", "IoULoss": "iou", "KnowledgeDistillationKLDivLoss": "kl"}


def assert_entries(case: Case, terms: dict[str, torch.Tensor]) -> None:
    """Each recorded loss, summed over its levels, which may be entries of their own, is our term."""
    expected: dict[str, torch.Tensor] = {}
    for key in case.data["loss_keys"]:
        entry = re.sub(r"_\d$", "", key)
        term = RECORDED_TERMS.get(entry, entry)
        expected[term] = expected.get(term, 0.0) + case.tensor(f"out.{key}").sum()
    assert set(terms) == set(expected)
    for term, value in terms.items():
        assert_close(case, term, value, expected[term])


def check_plain_head(case: Case) -> None:
    student, maps = openmmlab.build_recorded(case, "student", requires_grad=True)
    inputs = openmmlab.batched_inputs(case)
    assert_labels(case, student, maps, inputs)
    with EventStorage():
        terms = student.train()(inputs)
    assert_entries(case, terms)
    assert_recorded(case, "out.total", sum(terms.values()))
    assert_gradients(case, sum(terms.values()), student, maps)


def in_front_of_activation(case: Case) -> bool:
    """Whether the taps lie in front of the activation, which is not the published form."""
    return case.name.endswith("_preact_variant")


def build_methods(case: Case, student, teacher) -> list:
    """CrossKD, and PKD where it was recorded, with the recorded options."""
    options, always = case.data["kd_cfg"], build_schedule([])
    tap = Tap(options["reused_teacher_head_idx"], activated=not in_front_of_activation(case))
    box_loss = options["loss_reg_kd"]
    assert box_loss.get("class_reduction", "sum") == "sum"
    crosskd = CrossKD(
        taps={"cls": tap, "box": tap},
        cls_beta=options["loss_cls_kd"]["beta"],
        box_loss=RECORDED_BOX_LOSSES[box_loss["type"]],
        box_temperature=box_loss.get("T", 1.0),
        normalizer_floor=1e-6,
        weights={
            term: options[entry]["loss_weight"]
            for entry, term in (
                ("loss_cls_kd", "loss_crosskd_cls"),
                ("loss_reg_kd", "loss_crosskd_box"),
                ("loss_center_kd", "loss_crosskd_centerness"),
            )
            if entry in options
        },
        schedule=always,
    )
    if "loss_feat_kd" not in options:
        return [crosskd]
    pairs = pair_features(student, teacher, (), "in_features")
    return [
        crosskd,
        PKD(pairs=pairs, weights={"loss_pkd": options["loss_feat_kd"]["loss_weight"]}, schedule=always),
    ]


def check_crosskd_head(case: Case) -> None:
    if in_front_of_activation(case):  # recorded without its inputs, which are another case's
        arrays = load(SUITE, case.name.replace("_preact_variant", "")).arrays
        arrays = {key: value for key, value in arrays.items() if not key.startswith("out.")}
        case.arrays = {**arrays, **case.arrays}
    student, maps = openmmlab.build_recorded(case, "student", requires_grad=True)
    teacher, _ = openmmlab.build_recorded(case, "teacher")
    teacher.eval().requires_grad_(False)
    inputs = openmmlab.batched_inputs(case)
    assert_labels(case, student, maps, inputs)

    staged_student, staged_teacher = stage_detector(student.train()), stage_detector(teacher)
    methods = build_methods(case, staged_student, staged_teacher)
    images = staged_student.preprocess(inputs)
    taps = methods[0].taps()
    student_run = staged_student.run(images, [item["instances"] for item in inputs], taps=taps)
    teacher_run = staged_teacher.run(images, taps=taps, frozen=True)
    with EventStorage():
        plain = student_run.losses
    kd = {
        term: method.weight_at(term, 0) * value
        for method in methods
        for term, value in method(student_run, teacher_run).items()
    }

    assert_entries(case, {**plain, **kd})
    total_kd = sum(kd.values())
    assert_recorded(case, "out.total_kd", total_kd)
    assert_recorded(case, "out.total", total_kd + sum(plain.values()))
    if "mid.crossed_cls.0" in case.arrays:
        assert_crossed(case, methods[0], student_run, teacher_run)
    if in_front_of_activation(case):  # no gradient was recorded
        return
    assert_gradients(case, total_kd + sum(plain.values()), student, maps)

    to_maps, to_parameters = gradients(total_kd, case, student, maps)
    assert_recorded_gradient(case, "out.gradnorm_kd.student_feat", norms(to_maps))
    assert_recorded_gradient(case, "out.gradnorm_kd.params", norms(to_parameters))
    without = [name for name, g in zip(case.data["student_param_order"], to_parameters) if not g.any()]
    assert without == case.data["params_without_kd_grad"]


def assert_crossed(case: Case, crosskd: CrossKD, student_run, teacher_run) -> None:
    """What is crossed and what comes out of the teacher's head are as recorded."""
    for role, run in (("student", student_run), ("teacher", teacher_run)):
        for branch, recorded in (("cls", "cls"), ("box", "reg")):
            for level, feature in enumerate(run.taps[branch][crosskd.tap_of[branch]]):
                assert_recorded(case, f"mid.{role}_{recorded}_tap.{level}", feature)
    model = student_run.staged.model
    crossed = crosskd.crossed_outputs(student_run, teacher_run)
    for recorded, output in RECORDED_OUTPUTS.items():
        if output in crossed:
            levels = range(len(case.data["strides"]))
            maps = [case.tensor(f"mid.crossed_{recorded}.{level}") for level in levels]
            if case.data["detector"] == "fcos" and recorded == "reg":
                maps = [x.log() for x in maps]  # recorded behind the exponential
            expected = torch.cat(openmmlab.flat_outputs(model, **{output: maps})[output], dim=1)
            assert_close(case, f"mid.crossed_{recorded}", crossed[output], expected)


CHECKS = {
    "KDQualityFocalLoss": functools.partial(check_loss, elementwise=_kd_quality_focal),
    "QualityFocalLoss": functools.partial(check_loss, elementwise=_quality_focal),
    "DistributionFocalLoss": functools.partial(check_loss, elementwise=_distribution_focal),
    "KnowledgeDistillationKLDivLoss": functools.partial(check_loss, elementwise=_kd_kl_div),
    "GIoULoss": functools.partial(check_loss, elementwise=_giou),
    "IoULoss": functools.partial(check_loss, elementwise=_log_iou),
    "FocalLoss": functools.partial(check_loss, elementwise=_focal),
    "CrossEntropyLoss": functools.partial(check_loss, elementwise=_centerness),
    "PKDLoss": check_pkd,
    "align_scale": check_align,
    "coder": check_coder,
    "plain_head": check_plain_head,
    "crosskd_head": check_crosskd_head,
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    case = load(SUITE, name)
    run_check(kind_of(case), case, CHECKS, pending={})

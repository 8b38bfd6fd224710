"""Parity of losses, box coding, alignment and whole steps with numbers of the published CrossKD code."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss

from detectron2.utils.events import EventStorage

from d2_distill import losses
from d2_distill.detectors.box_coder import TwoSidedBox2BoxTransform
from d2_distill.methods import PKD, CrossKD
from d2_distill.methods.pairing import pair_features
from d2_distill.schedules import build_schedule
from d2_distill.staged import Assignment, stage_detector

from . import openmmlab
from .cases import Case, case_names, load
from .dispatch import assert_recorded, assert_recorded_gradient, assert_recorded_sum, run_check

SUITE = "crosskd"


def kind_of(case: Case) -> str:
    """The json's kind, refined by what decides which code is meant: the loss class, or the detector."""
    kind = case.data["kind"]
    if kind == "loss":
        return case.data["reference"].split("::")[1].split()[0]
    return f"{kind}_{case.data['detector']}" if "detector" in case.data else kind


def _kd_quality_focal(case, pred):
    loss = losses.kd_quality_focal_loss(
        pred, case.tensor("in.teacher_logits"), beta=case.data["options"]["beta"]
    )
    return loss, case.tensor("in.weight")[:, None] if "in.weight" in case.arrays else None


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


def build_model(case: Case, role: str, requires_grad: bool = False):
    """The recorded student or teacher, and its feature maps."""
    data = case.data
    maps = openmmlab.maps_of(case, f"{role}_feat", requires_grad=requires_grad)
    model = openmmlab.build_retinanet(maps, data["strides"], data["num_classes"], data["stacked_convs"])
    openmmlab.load_head(model, case, role)
    return model, maps


def assert_labels(case: Case, student, maps, inputs) -> None:
    """Classes and weights of all anchors are the recorded ones, in Detectron2's order of anchors."""
    gt_labels, gt_boxes = student.label_anchors(
        student.anchor_generator(maps), [item["instances"] for item in inputs]
    )
    sizes = [tensor.shape[-2] * tensor.shape[-1] * 9 for tensor in maps]
    for level, labels in enumerate(torch.stack(gt_labels).split(sizes, dim=1)):
        recorded = case.tensor(f"mid.labels.{level}").long()
        recorded[case.tensor(f"mid.label_weights.{level}") == 0] = -1
        recorded = openmmlab.to_size_outer(recorded.unflatten(1, (-1, 9)), 3, 3, dim=2).flatten(1)
        assert torch.equal(labels, recorded), f"{case.name}: labels of level {level}"
    assignment = Assignment(torch.stack(gt_labels), torch.stack(gt_boxes), student.num_classes)
    assert assignment.normalizer == case.data["avg_factor"]


def gradients(total: torch.Tensor, case: Case, student, maps):
    """Gradients of the student's maps and of its parameters in the recorded order; zeros for none."""
    parameters = dict(student.named_parameters())
    parameters = [parameters[openmmlab.parameter_name(name)] for name in case.data["student_param_order"]]
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


def check_plain_head(case: Case) -> None:
    student, maps = build_model(case, "student", requires_grad=True)
    inputs = openmmlab.batched_inputs(case)
    assert_labels(case, student, maps, inputs)
    with EventStorage():
        terms = student.train()(inputs)
    assert set(terms) == {"loss_cls", "loss_box_reg"}
    assert_recorded_sum(case, "out.loss_cls", terms["loss_cls"])
    assert_recorded_sum(case, "out.loss_bbox", terms["loss_box_reg"])
    assert_recorded(case, "out.total", sum(terms.values()))
    assert_gradients(case, sum(terms.values()), student, maps)


def build_methods(case: Case, student, teacher) -> list:
    """CrossKD, and PKD where it was recorded, with the recorded options."""
    options, always = case.data["kd_cfg"], build_schedule([])
    crosskd = CrossKD(
        tap=options["reused_teacher_head_idx"],
        cls_beta=options["loss_cls_kd"]["beta"],
        box_loss={"GIoULoss": "giou"}[options["loss_reg_kd"]["type"]],
        weights={
            "loss_crosskd_cls": options["loss_cls_kd"]["loss_weight"],
            "loss_crosskd_box": options["loss_reg_kd"]["loss_weight"],
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
    student, maps = build_model(case, "student", requires_grad=True)
    teacher, _ = build_model(case, "teacher")
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

    recorded = {
        "out.loss_cls": plain["loss_cls"],
        "out.loss_bbox": plain["loss_box_reg"],
        "out.loss_cls_kd": kd["loss_crosskd_cls"],
        "out.loss_reg_kd": kd["loss_crosskd_box"],
    }
    if "loss_pkd" in kd:
        recorded["out.loss_feat_kd"] = kd["loss_pkd"]
    assert set(recorded) == {f"out.{key}" for key in case.data["loss_keys"]}
    for key, value in recorded.items():
        assert_recorded_sum(case, key, value)
    total_kd = sum(kd.values())
    assert_recorded(case, "out.total_kd", total_kd)
    assert_recorded(case, "out.total", total_kd + sum(plain.values()))
    assert_gradients(case, total_kd + sum(plain.values()), student, maps)

    to_maps, to_parameters = gradients(total_kd, case, student, maps)
    assert_recorded_gradient(case, "out.gradnorm_kd.student_feat", norms(to_maps))
    assert_recorded_gradient(case, "out.gradnorm_kd.params", norms(to_parameters))
    without = [name for name, g in zip(case.data["student_param_order"], to_parameters) if not g.any()]
    assert without == case.data["params_without_kd_grad"]
    if "mid.crossed_cls.0" in case.arrays:
        assert_taps(case, student_run, teacher_run, methods[0].tap)


def assert_taps(case: Case, student_run, teacher_run, position: int) -> None:
    """The features that are crossed are the recorded ones: those behind the activation."""
    for role, run in (("student", student_run), ("teacher", teacher_run)):
        for branch, recorded in (("cls", "cls"), ("box", "reg")):
            for level, feature in enumerate(run.taps[branch][position]):
                assert_recorded(case, f"mid.{role}_{recorded}_tap.{level}", feature)


CHECKS = {
    "KDQualityFocalLoss": functools.partial(check_loss, elementwise=_kd_quality_focal),
    "KnowledgeDistillationKLDivLoss": functools.partial(check_loss, elementwise=_kd_kl_div),
    "GIoULoss": functools.partial(check_loss, elementwise=_giou),
    "IoULoss": functools.partial(check_loss, elementwise=_log_iou),
    "FocalLoss": functools.partial(check_loss, elementwise=_focal),
    "CrossEntropyLoss": functools.partial(check_loss, elementwise=_centerness),
    "PKDLoss": check_pkd,
    "align_scale": check_align,
    "coder": check_coder,
    "plain_head_retinanet": check_plain_head,
    "crosskd_head_retinanet": check_crosskd_head,
}

PENDING = {
    "QualityFocalLoss": "the GFL detector (issue 3)",
    "DistributionFocalLoss": "the GFL detector (issue 3)",
    **{
        f"{kind}_{detector}": f"CrossKD on {detector.upper()} (issue 4)"
        for kind in ("plain_head", "crosskd_head")
        for detector in ("gfl", "fcos", "atss")
    },
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    case = load(SUITE, name)
    run_check(kind_of(case), case, CHECKS, PENDING)

"""Whole steps of the published CrossKD code: GFL, ATSS, FCOS and RetinaNet, plain and distilled."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.boxes.anchor_grid import valid_cells
from d2_distill.config.keys import get_distill_cfg
from d2_distill.methods import CrossKD, build_methods
from d2_distill.staged import DenseRun, stage_detector
from d2_distill.teacher import Teacher

from .. import openmmlab
from ..cases import Case, load
from ..dispatch import assert_close, assert_recorded, assert_recorded_gradient
from .crosskd_configs import PublishedHead, distill_settings

ARCHITECTURES = {"gfl": "GFL", "atss": "ATSS", "fcos": "OpenMMLabFCOS", "retinanet": "OpenMMLabRetinaNet"}
# Recorded entry -> our term; the others have the same name.
TERMS = {
    "loss_cls_kd": "loss_crosskd_cls",
    "loss_reg_kd": "loss_crosskd_box",
    "losses_center_kd": "loss_crosskd_centerness",
    "loss_feat_kd": "loss_pkd",
    "loss_bbox": "loss_box_reg",
}
OUTPUTS = {"cls": "logits", "reg": "deltas", "ctr": "centerness"}


class Step:
    """The recorded student or teacher, and the recorded batch."""

    def __init__(self, case: Case, role: str, inputs: Case | None = None) -> None:
        """
        Args:
            role: "student" or "teacher".
            inputs: the case that holds weights and inputs; None: ``case`` itself.
        """
        self.case, self.inputs = case, inputs or case
        head, data = PublishedHead(case), case.data
        self.loss_weights = head.loss_weights
        self.maps = [self.inputs.tensor(f"in.{role}_feat.{level}") for level in range(data["levels"])]
        assert all(x.shape[1] == data["channels"] for x in self.maps)
        self.model = openmmlab.build_given(
            ARCHITECTURES[data["detector"]], list(data["strides"]), head.settings, maps=self.maps, groups=head.groups
        )
        prefix = f"{role}."
        openmmlab.load_head(self.model, {
            key[len(prefix) :]: self.inputs.tensor(key) for key in self.inputs.arrays if key.startswith(prefix)
        })
        self.staged = stage_detector(self.model)

    def batch(self) -> list[dict[str, Any]]:
        """Images of the recorded sizes, whose pixels do not matter, with the recorded ground truth."""
        return [
            {
                "image": torch.zeros(3, *size),
                "instances": openmmlab.instances_of(
                    size, self.inputs.tensor(f"in.gt_boxes.{index}"), self.inputs.tensor(f"in.gt_labels.{index}")
                ),
            }
            for index, size in enumerate(self.inputs.arrays["in.img_shape"].tolist())
        ]

    def images(self, batch: list[dict[str, Any]]) -> ImageList:
        """The batch, whose padding is the recorded one."""
        images = self.staged.preprocess(batch)
        assert list(images.tensor.shape[-2:]) == self.inputs.tensor("in.batch_input_shape").tolist()
        divisor = inspect.signature(valid_cells).parameters["size_divisibility"].default
        padded = [ImageList.from_tensors([x["image"]], divisor).tensor.shape[-2:] for x in batch]
        assert torch.equal(torch.tensor(padded), self.inputs.tensor("in.pad_shape"))
        return images

    def gradients(self, total: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of the maps, and of the parameters in the recorded order; zeros for none."""
        parameters = dict(self.model.named_parameters())
        names = [openmmlab.parameter_name(self.model, name) for name in self.case.data["student_param_order"]]
        assert set(names) == set(parameters)
        wanted = [*self.maps, *(parameters[name] for name in names)]
        found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(wanted, found)]
        return found[: len(self.maps)], found[len(self.maps) :]


def start_student(case: Case, inputs: Case | None = None, taps=None) -> tuple[Step, DenseRun]:
    """The student in training, whose assignment is the recorded one."""
    student = Step(case, "student", inputs)
    for x in student.maps:
        x.requires_grad_()
    student.model.train()
    batch = student.batch()
    run = student.staged.run(student.images(batch), [item["instances"] for item in batch], taps=taps)
    assert_assignment(case, run)
    return student, run


def assert_assignment(case: Case, run: DenseRun) -> None:
    """Classes of all anchors are the recorded ones, and so are the ignored anchors."""
    assignment, num_positive = run.assignment, []
    for level, labels in enumerate(assignment.labels.split(openmmlab.level_sizes(run), dim=1)):
        num_positive.append(int(((labels >= 0) & (labels < assignment.num_classes)).sum()))
        if f"mid.labels.{level}" not in case.arrays:  # those of the case that the inputs are of
            continue
        recorded = case.tensor(f"mid.labels.{level}").long().view(labels.shape)
        if f"mid.label_weights.{level}" in case.arrays:  # FCOS, which ignores nothing, has none
            weights = case.tensor(f"mid.label_weights.{level}")
            recorded = openmmlab.recorded_labels(recorded, weights, assignment.num_classes)
        recorded = openmmlab.labels_in_our_order(run.staged.model, recorded)
        assert torch.equal(labels, recorded), f"{case.name}: labels of level {level}"
    assert num_positive == case.data["n_pos"]
    if "avg_factor" in case.data:
        assert assignment.normalizer == case.data["avg_factor"]


def own_losses(student: Step, run: DenseRun) -> dict[str, torch.Tensor]:
    """The detector's losses, with the recorded weights."""
    with EventStorage():
        return {name: value * student.loss_weights.get(name, 1.0) for name, value in run.losses.items()}


def assert_entries(case: Case, terms: dict[str, torch.Tensor]) -> None:
    """Each recorded loss, summed over its levels, which may be entries of their own, is our term."""
    expected: dict[str, torch.Tensor] = {}
    for key in case.data["loss_keys"]:
        entry = re.sub(r"_\d$", "", key)
        term = TERMS.get(entry, entry)
        expected[term] = expected.get(term, 0.0) + case.tensor(f"out.{key}").sum()
    assert set(terms) == set(expected)
    for term, value in terms.items():
        assert_close(case, term, value, expected[term])


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors])


def assert_gradients(case: Case, total: torch.Tensor, student: Step) -> None:
    to_maps, to_parameters = student.gradients(total)
    for level, gradient in enumerate(to_maps):
        assert_recorded_gradient(case, f"out.grad_total.student_feat.{level}", gradient)
    assert_recorded_gradient(case, "out.gradnorm_total.params", norms(to_parameters))


def check_plain_head(case: Case) -> None:
    student, run = start_student(case)
    terms = own_losses(student, run)
    assert_entries(case, terms)
    assert_recorded(case, "out.total", sum(terms.values()))
    assert_gradients(case, sum(terms.values()), student)


def start_methods(case: Case, student: Step, teacher: Teacher, **changed: Any) -> nn.ModuleDict:
    cfg = get_distill_cfg()
    openmmlab.set_keys(cfg, {**distill_settings(case), **changed}, "MODEL.DISTILL.")
    return build_methods(cfg, student.staged, teacher)


def check_crosskd_head(case: Case) -> None:
    inputs = load("crosskd", case.data["inputs_of"]) if "inputs_of" in case.data else case
    step = Step(case, "teacher", inputs)
    teacher = Teacher(step.model, input_format="BGR")
    methods = start_methods(case, Step(case, "student", inputs), teacher)
    student, run = start_student(case, inputs, methods["CrossKD"].taps())
    teacher_run = teacher.staged.run(run.images, run.gt_instances, taps=run.wanted_taps, frozen=True)

    plain = own_losses(student, run)
    kd = {
        term: method.weight_at(term, 0) * value
        for method in methods.values()
        for term, value in method(run, teacher_run).items()
    }
    assert_entries(case, {**plain, **kd})
    total_kd = sum(kd.values())
    total = total_kd + sum(plain.values())
    assert_recorded(case, "out.total_kd", total_kd)
    assert_recorded(case, "out.total", total)
    if "mid.crossed_cls.0" in case.arrays:
        of_all = {"CROSSKD.CENTERNESS_WEIGHT": 1.0} if "mid.crossed_ctr.0" in case.arrays else {}
        assert_crossed(case, start_methods(case, student, teacher, **of_all)["CrossKD"], run, teacher_run)
    to_maps, to_parameters = student.gradients(total_kd)
    without = [name for name, g in zip(case.data["student_param_order"], to_parameters) if not g.any()]
    assert without == case.data["params_without_kd_grad"]
    if "out.gradnorm_total.params" in case.arrays:
        assert_gradients(case, total, student)
        assert_recorded_gradient(case, "out.gradnorm_kd.student_feat", norms(to_maps))
        assert_recorded_gradient(case, "out.gradnorm_kd.params", norms(to_parameters))


def assert_crossed(case: Case, crosskd: CrossKD, student_run: DenseRun, teacher_run: DenseRun) -> None:
    """What is crossed and what comes out of the teacher's head are as recorded."""
    for role, run in (("student", student_run), ("teacher", teacher_run)):
        for branch, recorded in (("cls", "cls"), ("box", "reg")):
            for level, feature in enumerate(run.taps[branch][crosskd.crossings[branch].tap]):
                assert_recorded(case, f"mid.{role}_{recorded}_tap.{level}", feature)
    model = student_run.staged.model
    crossed = crosskd.crossed_outputs(student_run, teacher_run)
    for recorded, output in OUTPUTS.items():
        keys = [f"mid.crossed_{recorded}.{level}" for level in range(case.data["levels"])]
        if keys[0] not in case.arrays:
            continue
        maps = [openmmlab.in_our_order(model, case.tensor(key), dim=1) for key in keys]
        if case.data["detector"] == "fcos" and recorded == "reg":
            maps = [x.log() for x in maps]  # recorded behind the exponential
        expected = teacher_run.grid.join(maps)
        assert_close(case, f"mid.crossed_{recorded}", crossed[output], expected)


CHECKS = {"plain_head": check_plain_head, "crosskd_head": check_crosskd_head}

"""Parity with numbers of the published HEAD code: schedules, FitNet, RetinaNet's box coding and losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2_distill.detectors import OpenMMLabRetinaNet
from d2_distill.detectors.box_coders import TwoSidedBox2BoxTransform
from d2_distill.methods import FeatureImitation
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule

from . import openmmlab
from .cases import Case, case_names, load
from .checks import head_assist, head_proposals, head_rois, head_teacher_free
from .dispatch import assert_recorded, run_check

SUITE = "head"


def _factors(spec: dict) -> list:
    """A recorded scheduler as our list of factors."""
    kind, value = spec["type"][: -len("Scheduler")], spec.get("value", 1.0)
    if kind == "Constant":
        return [["Constant", value]]
    if kind == "Linear":
        return [["Linear", spec["start_value"], spec["end_value"], spec["start_iter"], spec["end_iter"]]]
    if kind == "Chained":
        return [["Constant", value]] + [factor for inner in spec["schedulers"] for factor in _factors(inner)]
    return [["Constant", value], [kind, spec["iter_"]]]


def check_schedulers(case: Case) -> None:
    for name, spec in case.data["specs"].items():
        schedule = build_schedule(_factors(spec))
        assert_recorded(case, name, [schedule(iteration) for iteration in case.arrays["iterations"].tolist()])


def check_box_coder(case: Case) -> None:
    anchors, deltas, gt = (case.tensor(key) for key in ("anchors", "deltas", "gt"))
    for suffix, weights in (("", (1.0, 1.0, 1.0, 1.0)), ("_rcnn", (10.0, 10.0, 5.0, 5.0))):
        coder = TwoSidedBox2BoxTransform(weights=weights)
        assert_recorded(case, f"encoded{suffix}", coder.get_deltas(anchors, gt))
        boxes = coder.apply_deltas(deltas, anchors)
        if not suffix:
            assert_recorded(case, "decoded_free", boxes)
        clipped = Boxes(boxes)
        clipped.clip((90, 110))
        assert_recorded(case, f"decoded{suffix or '_clipped'}", clipped.tensor)


def check_retina_loss(case: Case) -> None:
    levels = [f"p{level}" for level in range(3, 8)]
    logits, deltas = (
        [case.tensor(f"{name}_{level}").requires_grad_() for level in levels]
        for name in ("cls_logits", "deltas")
    )
    data = case.data
    model = openmmlab.build_detector(OpenMMLabRetinaNet, logits, data["strides"], data["num_classes"])
    anchors = model.anchor_generator(logits)
    assignment = model.assign(
        anchors,
        [
            openmmlab.instances_of(
                data["img_shape"], case.tensor(f"gt_boxes_{image}"), case.tensor(f"gt_labels_{image}")
            )
            for image in range(len(logits[0]))
        ],
    )
    assert assignment.normalizer == case.tensor("num_total_pos")

    by_level = zip(levels, assignment.labels.split([len(boxes) for boxes in anchors], dim=1))
    for level, labels in by_level:
        recorded = case.tensor(f"labels_{level}").masked_fill(case.tensor(f"label_weights_{level}") == 0, -1)
        assert torch.equal(
            labels, openmmlab.labels_in_our_order(model, recorded)
        ), f"{case.name}: labels of {level}"

    with EventStorage():
        terms = model.losses(
            anchors, openmmlab.flat_outputs(model, logits=logits, deltas=deltas), assignment
        )
    for term, key in (("loss_cls", "loss_cls_per_level"), ("loss_box_reg", "loss_bbox_per_level")):
        torch.testing.assert_close(terms[term], case.tensor(key).sum(), **case.data["tolerance"])
    sum(terms.values()).backward()
    for level, logit_map, delta_map in zip(levels, logits, deltas):
        assert_recorded(case, f"grad_cls_{level}", logit_map.grad)
        assert_recorded(case, f"grad_deltas_{level}", delta_map.grad)


def check_fitnet(case: Case) -> None:
    levels = [f"p{level}" for level in range(3, 8)]
    maps = {
        role: {level: case.tensor(f"{role}_{level}") for level in levels} for role in ("student", "teacher")
    }
    for tensor in maps["student"].values():
        tensor.requires_grad_()
    pairs = [FeaturePair(level, level, 6, 6) for level in levels]
    method = FeatureImitation(pairs=pairs, weights={"loss_imitation": 1.0}, schedule=build_schedule([]))
    adapters = {key[len("adapt_") :]: case.tensor(key) for key in case.arrays if key.startswith("adapt_")}
    method.adapters.load_state_dict(adapters)
    student, teacher = (SimpleNamespace(features=maps[role]) for role in ("student", "teacher"))
    loss = method.weight_at("loss_imitation", 0) * method(student, teacher)["loss_imitation"]
    loss.backward()
    assert_recorded(case, "loss_total", loss)
    for level in levels:
        assert_recorded(case, f"adapted_{level}", method.adapters[level](maps["student"][level]))
        assert_recorded(case, f"grad_student_{level}", maps["student"][level].grad)


CHECKS = {
    "fitnet": check_fitnet,
    "schedulers": check_schedulers,
    "box_coder": check_box_coder,
    "retina_loss": check_retina_loss,
    **head_assist.CHECKS,
    **head_proposals.CHECKS,
    **head_rois.CHECKS,
    **head_teacher_free.CHECKS,
}


@pytest.mark.parametrize("name", case_names(SUITE))
def test_recorded_numbers(name):
    run_check(name, load(SUITE, name), CHECKS, pending={})

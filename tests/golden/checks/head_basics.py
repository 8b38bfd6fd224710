"""Schedules, FitNet, box coding and RetinaNet's losses of the published HEAD code."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2_distill.methods import FeatureImitation
from d2_distill.methods.pairing import FeaturePair
from d2_distill.methods.schedules import build_schedule

from ..cases import Case
from ..dispatch import assert_close, assert_recorded, assert_recorded_sum
from ..openmmlab import (
    RETINANET_ANCHORS,
    anchor_settings,
    build_given,
    given_run,
    instances_of,
    labels_in_our_order,
    level_sizes,
    recorded_labels,
)
from .crosskd_losses import delta_transform


def numbers_of(case: Case, pattern: str) -> list[float]:
    """Numbers that only the case's text tells: the groups of a pattern in it."""
    match = re.search(pattern, case.data["what"])
    assert match, f"{case.name}: the text does not tell {pattern!r}"
    return [float(number) for group in match.groups() for number in group.split()]


def level_names(case: Case, prefix: str) -> list[str]:
    """Pyramid levels, fine to coarse, that arrays are called after: "p3" of "<prefix>p3"."""
    found = [re.fullmatch(re.escape(prefix) + r"(p\d)", key) for key in case.arrays]
    return sorted(match[1] for match in found if match)


def _factors(spec: Any) -> list[list]:
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
    (clip,) = numbers_of(case, r"ln\(([\d.]+)\)")
    height, width = numbers_of(case, r"\(h,w\)=\((\d+),(\d+)\)")
    stds = numbers_of(case, r"stds ([\d. ]+\d)")
    for suffix, of_suffix in (("", [1.0] * 4), ("_rcnn", stds)):
        coder = delta_transform([0.0] * 4, of_suffix, clip)
        assert_recorded(case, f"encoded{suffix}", coder.get_deltas(anchors, gt))
        boxes = coder.apply_deltas(deltas, anchors)
        if not suffix:
            assert_recorded(case, "decoded_free", boxes)
        clipped = Boxes(boxes)
        clipped.clip((int(height), int(width)))
        assert_recorded(case, f"decoded{suffix or '_clipped'}", clipped.tensor)


def assigner_settings(assigner: Any) -> dict[str, Any]:
    """RetinaNet's keys for OpenMMLab's MaxIoUAssigner.

    Ours always claims the best anchors of a box, of whatever IoU.
    """
    assert assigner["match_low_quality"] and assigner["min_pos"] == 0
    return {
        "RETINANET.IOU_THRESHOLDS": [assigner["neg"], assigner["pos"]],
        "RETINANET.IOU_LABELS": [0, -1, 1],
    }


def check_retina_loss(case: Case) -> None:
    data, levels = case.data, level_names(case, "cls_logits_")
    maps = {
        output: [case.tensor(f"{key}_{level}").requires_grad_() for level in levels]
        for output, key in (("logits", "cls_logits"), ("deltas", "deltas"))
    }
    gamma, alpha = numbers_of(case, r"gamma ([\d.]+), alpha ([\d.]+)")
    strides = list(data["strides"])
    model = build_given("OpenMMLabRetinaNet", strides, {
        "RETINANET.NUM_CLASSES": data["num_classes"],
        "RETINANET.FOCAL_LOSS_ALPHA": alpha,
        "RETINANET.FOCAL_LOSS_GAMMA": gamma,
        **anchor_settings(strides, **RETINANET_ANCHORS),
        **assigner_settings(data["assigner"]),
    })
    num_images, size = len(maps["logits"][0]), tuple(data["img_shape"])
    gt_instances = [
        instances_of(size, case.tensor(f"gt_boxes_{image}"), case.tensor(f"gt_labels_{image}"))
        for image in range(num_images)
    ]
    run = given_run(model, maps, [size] * num_images, gt_instances)
    assert run.assignment.normalizer == case.tensor("num_total_pos")
    for level, labels in zip(levels, run.assignment.labels.split(level_sizes(run), dim=1)):
        recorded = recorded_labels(
            case.tensor(f"labels_{level}"), case.tensor(f"label_weights_{level}"), model.num_classes
        )
        recorded = labels_in_our_order(model, recorded)
        assert torch.equal(labels, recorded), f"{case.name}: labels of {level}"

    with EventStorage():
        terms = run.losses
    assert_recorded_sum(case, "loss_cls_per_level", terms["loss_cls"])
    assert_recorded_sum(case, "loss_bbox_per_level", terms["loss_box_reg"])
    sum(terms.values()).backward()
    for level, logit_map, delta_map in zip(levels, *maps.values()):
        assert_recorded(case, f"grad_cls_{level}", logit_map.grad)
        assert_recorded(case, f"grad_deltas_{level}", delta_map.grad)


def check_fitnet(case: Case) -> None:
    levels = level_names(case, "student_")
    maps = {role: {level: case.tensor(f"{role}_{level}") for level in levels} for role in ("student", "teacher")}
    for tensor in maps["student"].values():
        tensor.requires_grad_()
    (weight,) = numbers_of(case, r"weight ([\d.]+), no warm-up")
    method = FeatureImitation(
        pairs=[FeaturePair(level, level, *(maps[role][level].shape[1] for role in maps)) for level in levels],
        weights={"loss_imitation": weight},
        schedule=build_schedule([]),
    )
    adapters = {key[len("adapt_") :]: case.tensor(key) for key in case.arrays if key.startswith("adapt_")}
    method.adapters.load_state_dict(adapters)
    losses = []
    for pair in list(method.pairs):
        method.pairs = [pair]
        student, teacher = (SimpleNamespace(features=maps[role]) for role in ("student", "teacher"))
        losses.append(method.weight_at("loss_imitation", 0) * method(student, teacher)["loss_imitation"])
    sum(losses).backward()
    assert_close(case, "loss_per_level", torch.stack(losses), case.tensor("loss_per_level"))
    assert_recorded(case, "loss_total", sum(losses))
    for level in levels:
        assert_recorded(case, f"adapted_{level}", method.adapters[level](maps["student"][level]))
        assert_recorded(case, f"grad_student_{level}", maps["student"][level].grad)


CHECKS = {
    "fitnet": check_fitnet,
    "schedulers": check_schedulers,
    "box_coder": check_box_coder,
    "retina_loss": check_retina_loss,
}

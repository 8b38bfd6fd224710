"""TF-HEAD's imitation terms: losses along the schedule, and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from detectron2.structures import Instances
from torch import nn

from d2_distill.assistants.tracing import TracedAdapter
from d2_distill.methods import TFHEAD
from d2_distill.methods.schedules import build_schedule
from d2_distill.staged import StagedDense, stage_detector

from .. import openmmlab
from ..cases import Case
from ..dispatch import assert_close, assert_recorded
from .head_basics import level_names

# Entry of the iterations that gradients are recorded at.
GRADIENTS_AT = 2


def _student(channels: int, num_anchors: int, num_levels: int) -> StagedDense:
    """A detector of so many anchors a cell; its towers do not matter, as their ends are recorded."""
    strides = [8 * 2**level for level in range(num_levels)]
    settings = openmmlab.anchor_settings(strides, 4, scales_per_octave=num_anchors, ratios=[1.0])
    settings.update({"RETINANET.NUM_CLASSES": 1, "RETINANET.NUM_CONVS": 1})
    return stage_detector(openmmlab.build_given("OpenMMLabRetinaNet", strides, settings, channels=channels))


def _method(case: Case, num_levels: int) -> TFHEAD:
    out_dim, channels = case.arrays["conv1x1.weight"].shape[:2]
    data, rcnn_dim = case.data, case.arrays["rcnn_feature"].shape[1]
    student = _student(channels, len(case.arrays["decouple.bias"]) // rcnn_dim, num_levels)
    end = next(iter(student.towers.values())).end
    method = TFHEAD(
        cross_dense=nn.Conv2d(channels, out_dim, 1),
        cross_rcnn=TracedAdapter(student, end, rcnn_dim, per_anchor=True),
        weights={"loss_cross_dense": data["weights"]["fcos"], "loss_cross_rcnn": data["weights"]["rcnn"]},
        schedule=build_schedule([["Warmup", data["warmup"]], ["EarlyStop", data["early_stop"]]]),
    )
    for adapter, name in ((method.cross_dense, "conv1x1"), (method.cross_rcnn.linear, "decouple")):
        adapter.load_state_dict({part: case.tensor(f"{name}.{part}") for part in ("weight", "bias")})
    return method


def _rois(case: Case, num_images: int) -> list[Instances]:
    """The recorded RoIs, one entry an image."""
    images, positions = case.tensor("roi_ids").long().split([1, 4], dim=1)
    assert torch.equal(images, images.sort(dim=0).values)
    return [Instances((1, 1), positions=positions[images[:, 0] == image]) for image in range(num_images)]


def check_tf_head(case: Case) -> None:
    levels = level_names(case, "student_cls_tower_")
    ours, theirs = (
        [case.tensor(f"{name}_cls_tower_{level}").requires_grad_() for level in levels]
        for name in ("student", "fcos")
    )
    vectors = case.tensor("rcnn_feature").requires_grad_()
    method = _method(case, len(levels))
    wanted = method.cross_rcnn.taps().items()
    student = SimpleNamespace(taps={branch: dict.fromkeys(taps, ours) for branch, taps in wanted})
    rois = _rois(case, len(ours[0]))
    assert_recorded(case, "decoupled", method.cross_rcnn(student, rois, vectors)[0])
    iterations = case.arrays["iterations"].tolist()

    def along_schedule(term: str, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value * method.weight_at(term, iteration) for iteration in iterations])

    terms = {
        "loss_cross_dense": method.imitate_dense(ours, theirs),
        "loss_cross_rcnn": method.imitate_rcnn(student, rois, vectors),
    }
    per_level = torch.stack([method.imitate_dense([x], [y]) for x, y in zip(ours, theirs)])
    torch.testing.assert_close(per_level.sum(), terms["loss_cross_dense"])
    recorded = "loss_self_fcos_per_level"
    assert_close(case, recorded, along_schedule("loss_cross_dense", per_level), case.tensor(recorded))
    assert_recorded(case, "loss_self_rcnn", along_schedule("loss_cross_rcnn", terms["loss_cross_rcnn"]))
    for term, name in (("loss_cross_dense", "fcos"), ("loss_cross_rcnn", "rcnn")):
        total = terms[term] * method.weight_at(term, iterations[GRADIENTS_AT])
        found = torch.autograd.grad(total, [*ours, *theirs, vectors], allow_unused=True)
        for level, gradient in zip(levels, found):
            assert_recorded(case, f"grad_student_{name}_{level}", gradient)
        assert found[len(ours) :] == (None,) * (len(theirs) + 1), "the imitation reaches an assistant"


CHECKS = {"tf_head": check_tf_head}

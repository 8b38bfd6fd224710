"""Training losses of the published MSAD code: FCOS in AdelaiDet's form."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing

from d2_distill.assigners import Assignment, PointAssigner
from d2_distill.boxes.geometry import boxes_from_distances, centers_of
from d2_distill.detectors import OpenMMLabFCOS
from d2_distill.detectors.box_coders import DistanceCoder
from d2_distill.detectors.tower_detector import build_box_loss
from d2_distill.losses import centerness_targets, mean_over_processes

from ..cases import Case
from ..dispatch import assert_recorded
from ..openmmlab import build_detector


def check_losses(case: Case) -> None:
    """Each recorded location is an image of one cell of stride 1 here."""
    params, labels = case.data["params"], case.tensor("labels")
    positive = labels < params["num_classes"]
    assert_recorded(case, "ctrness_targets_pos", centerness_targets(case.tensor("reg_targets")[positive]))

    model = build_detector(
        OpenMMLabFCOS,
        [torch.zeros(len(labels), 1, 1, 1)],
        [1],
        params["num_classes"],
        assigner=PointAssigner((), 1.5),
        box_coder=DistanceCoder("relu"),
        box_loss=build_box_loss(params["loc_loss_type"], "", offset=1.0),
    )
    anchors = model.anchor_generator(model.backbone.maps)
    boxes = boxes_from_distances(centers_of(Boxes.cat(anchors).tensor), case.tensor("reg_targets"))
    assignment = Assignment(labels[:, None], boxes[:, None], params["num_classes"])
    recorded = {"logits": "logits", "deltas": "reg_pred", "centerness": "ctrness_pred"}
    inputs = {name: case.tensor(key).requires_grad_() for name, key in recorded.items()}
    outputs = {name: [x.view(len(labels), 1, -1)] for name, x in inputs.items()}
    with EventStorage(), _other_processes(params):
        terms = model.losses(anchors, outputs, assignment)

    for term, key, name in (
        ("loss_cls", "loss_fcos_cls", "logits"),
        ("loss_box_reg", "loss_fcos_loc", "deltas"),
        ("loss_centerness", "loss_fcos_ctr", "centerness"),
    ):
        assert_recorded(case, key, terms[term])
        (gradient,) = torch.autograd.grad(terms[term], inputs[name])
        assert gradient.any() == (name == "logits" or positive.any())
        if name == "deltas":
            # Recorded behind the activation, which stops the gradient where it returns 0.
            gradient = torch.where(inputs[name] > 0, gradient, case.tensor(f"grad_{key}"))
        assert_recorded(case, f"grad_{key}", gradient)


@contextlib.contextmanager
def _other_processes(params: dict) -> Iterator[None]:
    """A second process with the recorded number of positives and sum of centerness, if there was one."""
    if params["world_size"] == 1:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        other = multiprocessing.start_processes(
            _second_process, (address, params), nprocs=1, join=False, start_method="fork"
        )
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=2)
        try:
            yield
            other.join()
        finally:
            dist.destroy_process_group()


def _second_process(index: int, address: str, params: dict) -> None:
    dist.init_process_group("gloo", init_method=address, rank=1, world_size=2)
    mean_over_processes(torch.tensor(params["num_pos_other_ranks"]))
    mean_over_processes(torch.tensor(params["sum_ctrness_other_ranks"]))
    dist.destroy_process_group()


CHECKS = {"losses": check_losses}

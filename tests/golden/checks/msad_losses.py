"""Training losses of the published MSAD code: FCOS in AdelaiDet's form."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing

from d2_distill.boxes.geometry import boxes_from_distances
from d2_distill.losses import centerness_targets, mean_over_processes

from ..cases import Case
from ..dispatch import assert_recorded
from ..openmmlab import assignment_of, given_run
from .msad_head import msad_fcos


def check_losses(case: Case) -> None:
    """Each recorded location is an image of one cell of stride 1 here."""
    params, labels = case.data["params"], case.tensor("labels")
    positive = labels < params["num_classes"]
    assert_recorded(case, "ctrness_targets_pos", centerness_targets(case.tensor("reg_targets")[positive]))

    model = msad_fcos([1], {
        "NUM_CLASSES": params["num_classes"],
        "BOX_LOSS": params["loc_loss_type"],
        "FOCAL_LOSS_ALPHA": params["alpha"],
        "FOCAL_LOSS_GAMMA": params["gamma"],
    })
    recorded = {"logits": "logits", "deltas": "reg_pred", "centerness": "ctrness_pred"}
    inputs = {name: case.tensor(key).requires_grad_() for name, key in recorded.items()}
    maps = {name: [x.view(len(labels), -1, 1, 1)] for name, x in inputs.items()}
    run = given_run(model, maps, [(1, 1)] * len(labels))
    boxes = boxes_from_distances(run.grid.centers, case.tensor("reg_targets"))
    run.assignment = assignment_of(labels[:, None], boxes[:, None], model.num_classes)
    other_ranks = (params["num_pos_other_ranks"], params["sum_ctrness_other_ranks"])
    with EventStorage(), _other_processes(params["world_size"], *other_ranks):
        terms = run.losses

    assert set(case.data["values"]) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    for term, key, name in (
        ("loss_cls", "loss_fcos_cls", "logits"),
        ("loss_box_reg", "loss_fcos_loc", "deltas"),
        ("loss_centerness", "loss_fcos_ctr", "centerness"),
    ):
        assert_recorded(case, key, terms[term])
        assert case.data["values"][key] == case.tensor(key)
        (gradient,) = torch.autograd.grad(terms[term], inputs[name])
        assert gradient.any() == (name == "logits" or positive.any())
        if name == "deltas":
            # Recorded behind the activation, which stops the gradient where it returns 0.
            stopped = positive[:, None] & (inputs[name] == 0)
            assert not gradient[stopped].any()
            gradient = torch.where(stopped, case.tensor(f"grad_{key}"), gradient)
        assert_recorded(case, f"grad_{key}", gradient)


@contextlib.contextmanager
def _other_processes(world_size: int, num_positives: int, sum_centerness: float) -> Iterator[None]:
    """Further processes, one of which has the number of positives and sum of centerness of all of them."""
    if world_size == 1:
        assert num_positives == sum_centerness == 0
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        others = multiprocessing.start_processes(
            _other_process,
            (address, world_size, num_positives, sum_centerness),
            nprocs=world_size - 1,
            join=False,
            start_method="fork",
        )
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=world_size)
        try:
            yield
            others.join()
        finally:
            dist.destroy_process_group()


def _other_process(index: int, address: str, world_size: int, num_positives: int, sum_centerness: float) -> None:
    dist.init_process_group("gloo", init_method=address, rank=index + 1, world_size=world_size)
    mean_over_processes(torch.tensor(0 if index else num_positives))
    mean_over_processes(torch.tensor(0.0 if index else sum_centerness))
    dist.destroy_process_group()


CHECKS = {"losses": check_losses}

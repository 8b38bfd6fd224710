"""Two processes with half of the batch each train as one with all of it, and where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing, nn

from ..small_detectors import distiller_cfg, image_input, save_teacher

# Far behind all warm-ups, and no iteration at which gradients are measured.
ITERATION = 50_000
IMAGES = [
    image_input(64, 96, [[4, 4, 40, 44], [50, 10, 90, 60]], [0, 2]),
    image_input(64, 96, [], [], seed=1),
    image_input(64, 96, [[40, 8, 90, 60]], [1], seed=2),
    image_input(64, 96, [], [], seed=3),
]
BOTH_HAVE_OBJECTS = [IMAGES[0], IMAGES[2], IMAGES[1], IMAGES[3]]
ALL_OF_LD = {f"DISTILL__LD__{name}__WEIGHT": 1.0 for name in ("MAIN_LD", "VLR_LD", "MAIN_KD", "VLR_KD")}
NO_ROIS = {"DISTILL__TF_HEAD__RCNN_WEIGHT": 0.0, "DISTILL__TF_HEAD__CROSS_RCNN_WEIGHT": 0.0}


def _region(name: str, **overrides) -> tuple:
    return "GFL", "GFL", ["FeatureImitation"], {"DISTILL__IMITATION__REGION": name, **overrides}


# Name -> student, teacher, methods and overrides.
EQUAL = {
    **{
        f"{detector} alone": (detector, None, [], {})
        for detector in ("ATSS", "GFL", "GFLv2", "OpenMMLabFCOS", "OpenMMLabRetinaNet", "TOOD")
    },
    "LD": ("GFL", "GFL", ["LD"], ALL_OF_LD),
    "LD on points": ("OpenMMLabFCOS distributions", "OpenMMLabFCOS distributions", ["LD"], ALL_OF_LD),
    "LD on anchors": ("OpenMMLabRetinaNet distributions", "OpenMMLabRetinaNet distributions", ["LD"], ALL_OF_LD),
    "CrossKD": ("GFL", "GFL", ["CrossKD"], {}),
    "CrossKD of deltas": ("OpenMMLabRetinaNet", "OpenMMLabRetinaNet", ["CrossKD"], {}),
    "CrossKD across assigners": ("GFL", "OpenMMLabFCOS", ["CrossKD"], {"DISTILL__CROSSKD__BOX_WEIGHT": 0.0}),
    "PKD": ("GFL", "OpenMMLabFCOS", ["PKD"], {}),
    "whole maps": _region("whole"),
    "region inside_gt": _region("inside_gt"),
    "region decouple": _region("decouple"),
    "region finegrained": _region("finegrained"),
    "region gibox": _region("gibox"),
    "region main": _region("main"),
    "HEAD with a one-stage teacher": ("OpenMMLabRetinaNet", "GFL", ["HEAD"], {}),
    "TFHEAD with a one-stage assistant": ("OpenMMLabRetinaNet", None, ["TFHEAD"], NO_ROIS),
    "MSAD": ("GFL", "GFL", ["MSAD"], {}),
}
OF_A_PROCESS = {
    name: (*EQUAL[name][:3], {**EQUAL[name][3], "DISTILL__NORMALIZE_PER_PROCESS": True})
    for name in ("LD", "CrossKD", "PKD", "region inside_gt", "region decouple", "region main")
}
OF_A_PROCESS["OpenMMLabRetinaNet alone"] = ("OpenMMLabRetinaNet", None, [], {"RETINANET__NORMALIZE_PER_PROCESS": True})
CASES = {
    **{f"{name}, of all": case for name, case in EQUAL.items()},
    **{f"{name}, of each": case for name, case in OF_A_PROCESS.items()},
}
BATCHES = {"objects in both": BOTH_HAVE_OBJECTS, "objects in one": IMAGES}


def gradients(model: nn.Module, images: list[dict]) -> dict[str, torch.Tensor]:
    """Return what a training step gives each parameter, of the student and of the methods."""
    model.zero_grad()
    with EventStorage(ITERATION):
        sum(model(images).values()).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _as_one_of_two(rank: int, models: dict[str, nn.Module], folder: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {
        (name, batch): gradients(model, images[rank::2])
        for name, model in models.items()
        for batch, images in BATCHES.items()
    }
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, nn.Module]:
    teachers = {None: None}
    for _, teacher, _, _ in CASES.values():
        if teacher not in teachers:
            folder: Path = tmp_path_factory.mktemp("teacher")
            teachers[teacher] = save_teacher(folder, teacher)
    built = {}
    for name, (student, teacher, methods, overrides) in CASES.items():
        torch.manual_seed(0)
        model = build_model(distiller_cfg(student, teachers[teacher], methods, **overrides))
        built[name] = (model.prepare_training() if methods else model.student).train()
    return built


@pytest.fixture(scope="module")
def differences(models, tmp_path_factory) -> dict[tuple[str, str], float]:
    """Norm of the difference between DDP's mean of the gradients and those of one process, in parts of the latter."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.start_processes(_as_one_of_two, (models, str(folder)), nprocs=2, start_method="fork")
    halves = [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]
    found = {}
    for name, model in models.items():
        for batch, images in BATCHES.items():
            whole = gradients(model, [*images[0::2], *images[1::2]])
            means = [torch.stack([half[name, batch][key] for half in halves]).mean(dim=0) for key in whole]
            norms = [
                torch.stack([value.double().norm() for value in values]).norm()
                for values in ([a - b for a, b in zip(means, whole.values())], list(whole.values()))
            ]
            found[name, batch] = (norms[0] / norms[1]).item()
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(differences, name, batch):
    assert differences[f"{name}, of all", batch] < 1e-5


@pytest.mark.parametrize("name", OF_A_PROCESS)
def test_normalizers_of_a_process_on_request(differences, name):
    """As published code has them: an object counts for more in a process with few."""
    assert differences[f"{name}, of each", "objects in one"] > 1e-3

"""What a training step computes once, and how often the host would wait for a GPU in it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from d2_distill.assigners import GroundTruth, strategies
from d2_distill.boxes import anchor_grid
from d2_distill.boxes.anchor_grid import AnchorGrid
from d2_distill.methods import localization

from ..small_detectors import batch, build, detector_cfg, distiller_cfg, save_teacher

VALUABLE = {"DISTILL__LD__VLR_LD__WEIGHT": 1.0, "DISTILL__LD__VLR_KD__WEIGHT": 1.0}
PUBLISHED = {
    "CrossKD": ["CrossKD"],
    "LD": ["LD"],
    "PKD": ["PKD"],
    "FeatureImitation": ["FeatureImitation"],
    "together": ["LD", "CrossKD", "FeatureImitation"],
}


def _distiller(folder, case: str, methods: list[str]):
    cfg = distiller_cfg(case, save_teacher(folder, case), methods, DISTILL__IMITATION__REGION="main", **VALUABLE)
    model = build_model(cfg).prepare_training().train()
    for _ in range(model._unchecked_steps):  # the first steps check every term
        with EventStorage():
            model(batch())
    return model


def test_repeated_work_is_done_once(tmp_path, monkeypatch):
    """One assignment, ground truth, grid and padding mask a step, whoever reads them; each output is joined once."""
    model, calls = _distiller(tmp_path, "GFL", PUBLISHED["together"]), Counter()

    def count(owner, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(strategies, "match_atss")
    count(localization, "atss_thresholds")
    count(GroundTruth, "from_instances")
    count(anchor_grid, "valid_cells")
    count(AnchorGrid, "from_levels")
    count(AnchorGrid, "join")
    with EventStorage():
        model(batch())
    # Student and teacher have a grid each, and join logits and deltas; CrossKD joins what it crossed.
    assert calls == {"match_atss": 1, "from_instances": 1, "valid_cells": len(batch()), "from_levels": 2, "join": 6}


class WaitCounter(TorchDispatchMode):
    """Counts the operators for whose result the host waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "nms", "unique2"):
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def _waits(model) -> Counter:
    with EventStorage(), WaitCounter() as counter:
        losses = model(batch())
        sum(losses.values()).backward()
    # Detectron2's ImageList reads the sizes of images from tensors that are always on the host.
    with WaitCounter() as on_host:
        getattr(model, "student", model).preprocess_image(batch())
    return counter.waits - on_host.waits


@pytest.mark.parametrize("case", ["GFL", "GFLv2", "ATSS", "OpenMMLabFCOS", "OpenMMLabRetinaNet distributions"])
def test_waits_of_the_detectors(case):
    """Once, for the number of positives."""
    assert _waits(build(detector_cfg(case)).train()) == {"nonzero": 1}


@pytest.mark.parametrize("case", ["GFL", "OpenMMLabRetinaNet distributions"])
@pytest.mark.parametrize("methods", PUBLISHED.values(), ids=PUBLISHED)
def test_waits_of_the_methods(case, methods, tmp_path):
    """LD waits a second time, for the number of anchors in its region."""
    expected = 2 if "LD" in methods else 1
    assert _waits(_distiller(tmp_path, case, methods)) == {"nonzero": expected}

"""Every config of the originals' tables builds (test_configs.py) and here, in a small form, takes a training step."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from d2_distill.detectors.building import DISTILLER, build_detector
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.engine.setup import load_config
from d2_distill.evaluation.speed import synthetic_batch
from d2_distill.layers.memory_format import in_fast_layout
from d2_distill.staged import stage_detector
from d2_distill.teacher import teacher_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import benchmark  # noqa: E402

# Pattern of paths -> why no step is taken of them.
LEFT_OUT = {
    r".*/Base[^/]*\.yaml": "no config of its own: others stand on it",
    r"configs/(bccd|quickstart)/.*": "of no table; tests/end_to_end/ and the examples train them",
}
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
TRAINED = [path for path in CONFIGS if not any(re.fullmatch(pattern, path) for pattern in LEFT_OUT)]

# Below MODEL: the same kinds of networks, but narrow, and ResNets of few blocks. ResNet-18 and -34 have one width.
SMALL = {
    "DEVICE": "cpu",
    "WEIGHTS": "",
    "FPN.OUT_CHANNELS": 32,
    "MOBILENETV2.WIDTH_MULT": 0.25,
    "SWIN.EMBED_DIM": 24,
    "RPN.PRE_NMS_TOPK_TRAIN": 50,
    "RPN.POST_NMS_TOPK_TRAIN": 20,
    "RPN.BATCH_SIZE_PER_IMAGE": 16,
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "ROI_BOX_HEAD.FC_DIM": 32,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
}
# timm has no narrow ones of these; they are of the same blocks.
SMALLER = {"res2net101d": "res2net50d", "convnext_tiny": "convnext_atto"}


def small(cfg) -> list:
    """Keys and values of a config that make its network small."""
    values = dict(SMALL)
    node = cfg.MODEL.RESNETS
    builders = [cfg.MODEL.BACKBONE.NAME, cfg.MODEL.LOW_RESOLUTION.BACKBONE]
    if any("slimmable" in name for name in builders):
        values["SLIMMABLE.WIDTH_MULT"] = min(cfg.MODEL.SLIMMABLE.WIDTH_MULT_LIST)
    elif node.DEPTH >= 50:
        values.update({"RESNETS.DEPTH": 50, "RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.RES2_OUT_CHANNELS": 16})
        values["RESNETS.WIDTH_PER_GROUP"] = 1 if node.NUM_GROUPS > 1 else 8
    else:
        values["RESNETS.DEPTH"] = 18
    if cfg.MODEL.TIMM.NAME in SMALLER:
        values["TIMM.NAME"] = SMALLER[cfg.MODEL.TIMM.NAME]
    return [item for key, value in values.items() for item in (f"MODEL.{key}", value)]


def small_config(path: str):
    """The config of a path, and that of its teacher or None, both small."""
    cfg = load_config(path, ["MODEL.DEVICE", "cpu"])
    teacher = None
    opts = small(cfg)
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER and cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
        teacher = teacher_config(cfg)
        teachers = small(teacher)
        teacher.merge_from_list(teachers)
        opts += ["MODEL.DISTILL.TEACHER.OPTS", [*cfg.MODEL.DISTILL.TEACHER.OPTS, *teachers]]
    cfg.merge_from_list(opts)
    return cfg, teacher


def kind_of(value, key: str = ""):
    """What two configs have in common whose steps run the same operations: all but paths and the sizes of weights."""
    if isinstance(value, CfgNode):
        return tuple((name, kind_of(item, name)) for name, item in value.items() if name not in NO_OPERATION)
    return bool(value) if isinstance(value, float) else repr(value)


NO_OPERATION = ("WEIGHTS", "CONFIG_FILE", "OPTS", "PIXEL_MEAN", "PIXEL_STD", "SCHEDULE")
_steps: dict[Any, str] = {}  # kind of configs -> path of the one that took a step


def test_all_configs_are_trained_or_left_out():
    assert all(any(re.fullmatch(pattern, path) for path in CONFIGS) for pattern in LEFT_OUT)
    assert len(TRAINED) > 150


@pytest.mark.parametrize("path", TRAINED)
def test_step(path, monkeypatch):
    """Losses are finite and reach all parameters that are trained, which the optimizer then changes.

    Configs that run the same operations share a step.
    """
    monkeypatch.chdir(ROOT)
    cfg, teacher = small_config(path)
    kind = (kind_of(cfg.MODEL), teacher and kind_of(teacher.MODEL), cfg.SOLVER.OPTIMIZER)
    if kind not in _steps:
        take_step(cfg)
        _steps[kind] = path


def take_step(cfg) -> None:
    torch.manual_seed(0)
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        model = benchmark.build_distiller(cfg)
        plain = model.student
    else:
        model = plain = benchmark.damp(build_detector(cfg))
    model = in_fast_layout(model.train())
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model(synthetic_batch(2, 64, 64, num_classes=stage_detector(plain).num_classes))
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and [name for name, p in trained.items() if p.grad is None] == []
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    assert any(not torch.equal(before[name], p) for name, p in trained.items())

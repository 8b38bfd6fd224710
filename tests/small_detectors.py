"""Detectors small enough for tests, batches for them, and teachers saved to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.building import build_detector
from d2_distill.layers.tower import Tap
from d2_distill.staged import StagedDetector, Taps

from .golden.cases import fill_parameters

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_CLASSES = 3

_BACKBONE = {
    "DEVICE": "cpu",
    "WEIGHTS": "",
    "BACKBONE.NAME": "build_narrow_resnet_fpn_backbone",
    "BACKBONE.FREEZE_AT": 0,
    "RESNETS.DEPTH": 18,
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.RES2_OUT_CHANNELS": 16,
    "FPN.OUT_CHANNELS": 32,
}
_DENSE = {
    "RETINANET.NUM_CLASSES": NUM_CLASSES,
    "RETINANET.IN_FEATURES": ["p3", "p4", "p5"],
    "RETINANET.NUM_CONVS": 2,
    "ANCHOR_GENERATOR.SIZES": [[16, 24], [32, 48], [64, 96]],
    "FCOS.NUM_CLASSES": NUM_CLASSES,
    "FCOS.IN_FEATURES": ["p3", "p4", "p5"],
    "FCOS.NUM_CONVS": 2,
    "FCOS.SCORE_THRESH_TEST": 0.05,
    "FCOS.SIZES_OF_INTEREST": [32, 64],
    "ATSS.NUM_CLASSES": NUM_CLASSES,
    "ATSS.IN_FEATURES": ["p3", "p4", "p5"],
    "ATSS.NUM_CONVS": 2,
    "ATSS.ANCHOR_SCALE": 4,
    "GFL.NUM_CLASSES": NUM_CLASSES,
    "GFL.IN_FEATURES": ["p3", "p4", "p5"],
    "GFL.NUM_CONVS": 2,
    "GFL.ANCHOR_SCALE": 4,
    "TOOD.NUM_CLASSES": NUM_CLASSES,
    "TOOD.IN_FEATURES": ["p3", "p4", "p5"],
    "TOOD.NUM_CONVS": 2,
    "TOOD.ANCHOR_SCALE": 4,
    "TOOD.INITIAL_ITERS": 0,
}
_DISTRIBUTIONS = {"FCOS.REG_MAX": 16, "ATSS.REG_MAX": 16, "RETINANET.REG_MAX": 16, "RETINANET.BBOX_REG_LOSS_TYPE": "giou"}
_STAGES = ["res2", "res3", "res4", "res5"]
_FROM_P2 = {"RESNETS.OUT_FEATURES": _STAGES, "FPN.IN_FEATURES": _STAGES}
_RCNN = {
    "ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [96]],
    "RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "RPN.BATCH_SIZE_PER_IMAGE": 32,
    "RPN.PRE_NMS_TOPK_TRAIN": 50,
    "RPN.PRE_NMS_TOPK_TEST": 50,
    "RPN.POST_NMS_TOPK_TRAIN": 20,
    "RPN.POST_NMS_TOPK_TEST": 20,
    "ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "ROI_BOX_HEAD.FC_DIM": 32,
}
_CASCADE = {
    **_RCNN,
    "ROI_HEADS.NAME": "CascadeROIHeads",
    "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    # Falling thresholds, so that stages that are not trained have positives too.
    "ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.2, 0.1],
}
# Case -> base config and overrides below MODEL. The name up to a space is the meta-architecture.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "RetinaNet": ("Base-RetinaNet.yaml", _DENSE),
    # Its towers' norms hold statistics for each level and count their calls.
    "RetinaNet BN": ("Base-RetinaNet.yaml", {**_DENSE, "RETINANET.NORM": "BN", "RESNETS.NORM": "BN"}),
    "OpenMMLabRetinaNet": ("Base-RetinaNet.yaml", _DENSE),
    "FCOS": ("Base-RetinaNet.yaml", _DENSE),
    "OpenMMLabRetinaNet distributions": ("Base-RetinaNet.yaml", {**_DENSE, **_DISTRIBUTIONS}),
    "OpenMMLabFCOS": ("Base-RetinaNet.yaml", {**_DENSE, "FCOS.DISTANCES": "exp", "FCOS.CENTERNESS_ON": "cls"}),
    "OpenMMLabFCOS distributions": ("Base-RetinaNet.yaml", {**_DENSE, **_DISTRIBUTIONS}),
    "ATSS": ("Base-RetinaNet.yaml", _DENSE),
    "ATSS distributions": ("Base-RetinaNet.yaml", {**_DENSE, **_DISTRIBUTIONS}),
    "GFL": ("Base-RetinaNet.yaml", _DENSE),
    "GFLv2": ("Base-RetinaNet.yaml", _DENSE),
    # One tower for classes and boxes; targets by what it predicts.
    "TOOD": ("Base-RetinaNet.yaml", _DENSE),
    "MultiScaleDetector": ("Base-RetinaNet.yaml", {**_DENSE, **_FROM_P2}),
    "GeneralizedRCNN": ("Base-RCNN-FPN.yaml", _RCNN),
    "GeneralizedRCNN cascade": ("Base-RCNN-FPN.yaml", _CASCADE),
}
ONE_STAGE = [case for case in CASES if "RCNN" not in case]
RETINANETS = [case for case in CASES if "RetinaNet" in case]


def detector_cfg(case: str, **overrides: Any) -> CfgNode:
    """Config of a plain detector; keywords are keys below MODEL, with ``__`` for the dots."""
    base, values = CASES[case]
    values = {**_BACKBONE, **values, "META_ARCHITECTURE": case.split()[0]}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIGS / base))
    cfg.merge_from_list([item for key, value in values.items() for item in (f"MODEL.{key}", value)])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


def build(cfg: CfgNode, salt: int | None = None) -> nn.Module:
    """The plain detector as initialised with seed 0; with a salt, with larger, diverse parameters instead."""
    torch.manual_seed(0)
    model = build_detector(cfg)
    if salt is not None:
        fill_parameters(model, salt)
    return model


@dataclass(frozen=True)
class SavedTeacher:
    """The two files that a teacher is given by."""

    config_file: str
    weights: str


def save_teacher(folder: Path, case: str, **overrides: Any) -> SavedTeacher:
    cfg = detector_cfg(case, **overrides)
    (folder / "teacher.yaml").write_text(cfg.dump())
    DetectionCheckpointer(build(cfg, salt=1), str(folder)).save("teacher")
    return SavedTeacher(str(folder / "teacher.yaml"), str(folder / "teacher.pth"))


def distiller_cfg(
    case: str, teacher: SavedTeacher | None, methods: Sequence[str] = (), **overrides: Any
) -> CfgNode:
    """Config of a distilled student; overrides as for :func:`detector_cfg`."""
    node = {
        "META_ARCHITECTURE": "Distiller",
        "DISTILL__STUDENT": case.split()[0],
        "DISTILL__METHODS": tuple(methods),
        "DISTILL__CROSSKD__CLS_TAP": 1,
        "DISTILL__CROSSKD__BOX_TAP": 1,
    }
    if teacher is not None:
        node["DISTILL__TEACHER__CONFIG_FILE"] = teacher.config_file
        node["DISTILL__TEACHER__WEIGHTS"] = teacher.weights
    return detector_cfg(case, **{**node, **overrides})


def allowed_methods(case: str, teacher_case: str) -> list[str]:
    """The methods that serve a student and a teacher of these cases."""
    crosskd = ["CrossKD"] if {case, teacher_case} <= set(ONE_STAGE) else []
    crosskd_roi = ["CrossKDRoI"] if case not in ONE_STAGE and teacher_case == "GeneralizedRCNN" else []
    head = ["HEAD"] if case in ONE_STAGE or case == "GeneralizedRCNN" and teacher_case not in ONE_STAGE else []
    return crosskd + crosskd_roi + ["FeatureImitation"] + head + ["PKD"]


def all_taps(staged: StagedDetector) -> Taps:
    """Every place in the towers of a detector."""
    return {
        branch: frozenset({Tap(0), *(Tap(k + 1, behind) for k in range(len(tower)) for behind in (False, True))})
        for branch, tower in getattr(staged, "towers", {}).items()
    }


def image_input(height: int, width: int, boxes=(), classes=(), seed: int = 0) -> dict[str, Any]:
    """A Detectron2 dataset dict, as the mapper makes it."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": instances}


def batch(seed: int = 0) -> list[dict[str, Any]]:
    """Two images of different sizes, which a batch pads to 96 x 96; three boxes."""
    return [
        image_input(64, 96, [[4, 4, 40, 44], [50, 10, 90, 60]], [0, 2], seed=seed),
        image_input(96, 64, [[8, 16, 40, 80]], [1], seed=seed + 100),
    ]

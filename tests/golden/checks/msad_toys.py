"""The toy detectors that steps of the published MSAD code were recorded with, as ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from d2_distill.apps.conversion.msad import head_names
from d2_distill.backbones.low_resolution import LowResolution
from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors.building import build_detector
from d2_distill.staged import stage_detector

from ..cases import Case
from ..openmmlab import instances_of, point_bounds, set_keys
from .msad_head import MSAD_FCOS

# What a published state dict's prefixes are in ours.
TEACHER = {"T_backbone.": "detector.backbone.", "T_fcos_head.": "detector.head.", "SE.": "fusion."}
STUDENT = {"S_backbone.": "backbone.pyramid.", "S_fcos_head.": "head."}
STATISTICS = ("running_mean", "running_var")


class ToyPyramid(Backbone):
    """The recordings' backbone: p_k = BatchNorm(Conv1x1(average over cells of 2^k pixels))."""

    def __init__(self, levels: Sequence[int], channels: int, **norm: float) -> None:
        super().__init__()
        self.levels, self.channels = levels, channels
        for level in levels:
            self.add_module(f"conv{level}", nn.Conv2d(3, channels, 1))
            self.add_module(f"bn{level}", nn.BatchNorm2d(channels, **norm))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{level}": ShapeSpec(channels=self.channels, stride=2**level) for level in self.levels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        modules = dict(self.named_children())
        return {
            f"p{level}": modules[f"bn{level}"](modules[f"conv{level}"](F.avg_pool2d(x, 2**level)))
            for level in self.levels
        }


@BACKBONE_REGISTRY.register()
def toy_pyramid(cfg, input_shape: ShapeSpec) -> ToyPyramid:
    """Of the levels and with the options of MODEL.TOY."""
    node = cfg.MODEL.TOY
    return ToyPyramid(node.LEVELS, node.CHANNELS, eps=node.EPS, momentum=node.MOMENTUM)


@BACKBONE_REGISTRY.register()
def toy_low_resolution_pyramid(cfg, input_shape: ShapeSpec) -> LowResolution:
    return LowResolution(toy_pyramid(cfg, input_shape), factor=cfg.MODEL.LOW_RESOLUTION.FACTOR)


class Toys:
    """The toy detectors of a case, from its parameters.

    Attributes:
        cfg: of the method, and of what the detectors share.
        levels: of the recorded backbone, some of which the student does not have.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.params = case, case.data["params"]
        toy = re.fullmatch(
            r"Toy backbone \(test double\): for k in (\d)\.\.(\d), p_k = BatchNorm2d_k\(Conv1x1_k\("
            r"avg_pool2d\(x, 2\^k, stride 2\^k\)\)\), conv 3->(\d+) with bias, BN eps ([\d.e-]+) momentum ([\d.]+); "
            r"the parameters are conv<k>\.weight/bias and bn<k>\.\*\. Towers have zero convolutions\.",
            case.data["toy_backbone"],
        )
        first, last, self._channels = (int(number) for number in toy.groups()[:3])
        self.levels = list(range(first, last + 1))
        assert set(self.low_levels) <= set(self.levels)
        self._norm = {"EPS": float(toy[4]), "MOMENTUM": float(toy[5])}
        assert self.params["others"] == "defaults"
        self.cfg = self._cfg("OpenMMLabFCOS", "toy_low_resolution_pyramid", self.low_levels)

    @property
    def low_levels(self) -> list[int]:
        return [int(name[1:]) for name in self.params["L_IN_FEATURES"]]

    def _cfg(self, detector: str, backbone: str, levels: list[int]) -> CfgNode:
        params, data = self.params, self.case.data
        cfg = get_distill_cfg()
        cfg.MODEL.TOY = CfgNode({"LEVELS": levels, "CHANNELS": self._channels, **self._norm})
        assert params["NUM_CLS_CONVS"] == params["NUM_BOX_CONVS"]
        fcos = {
            **MSAD_FCOS,
            "NUM_CLASSES": params["NUM_CLASSES"],
            "IN_FEATURES": list(params["H_IN_FEATURES"]),
            "NUM_CONVS": params["NUM_SHARE_CONVS"] + params["NUM_CLS_CONVS"],
            "SIZES_OF_INTEREST": point_bounds([tuple(ends) for ends in params["SIZES_OF_INTEREST"]]),
        }
        if "INFERENCE_TH_TEST" in data:
            fcos["SCORE_THRESH_TEST"] = data["INFERENCE_TH_TEST"]
        set_keys(cfg, {
            "META_ARCHITECTURE": detector,
            "BACKBONE.NAME": backbone,
            "DEVICE": "cpu",
            "PIXEL_MEAN": list(params["PIXEL_MEAN"]),
            "PIXEL_STD": list(params["PIXEL_STD"]),
            "MSAD.JOINT_WEIGHT": params["JOINT_WEIGHT"],
            "MSAD.FUSION_SCORE": data.get("fusion_variant", "per_image"),
            "DISTILL.METHODS": ("MSAD",),
            "DISTILL.MSAD.WEIGHT": params["KD_ALPHA"] * params["KD_TEMPERATURE"],
            **{f"FCOS.{key}": value for key, value in fcos.items()},
        })
        return cfg

    def teacher(self) -> nn.Module:
        model = build_detector(self._cfg("MultiScaleDetector", "toy_pyramid", self.levels))
        strides = list(self.params["FPN_STRIDES"])
        assert stage_detector(model).strides == strides
        shapes = model.backbone.output_shape()
        assert [model.factor * shapes[name].stride for name in self.params["L_IN_FEATURES"]] == strides
        return load(model, self.case, TEACHER)

    def student(self) -> nn.Module:
        """Without the level that is recorded as computed but not used; with random weights."""
        model = build_detector(self.cfg)
        assert stage_detector(model).strides == list(self.params["FPN_STRIDES"])
        assert list(model.backbone.pyramid.output_shape()) == list(self.params["L_IN_FEATURES"])
        return model

    def unused(self) -> ToyPyramid:
        """The levels of the recorded backbone that the student does not have."""
        levels = [level for level in self.levels if level not in self.low_levels]
        norm = {key.lower(): value for key, value in self._norm.items()}
        return ToyPyramid(levels, self._channels, **norm)

    def is_unused(self, name: str) -> bool:
        """Whether a published name is of a level that the student does not have."""
        return name.startswith("S_backbone.") and name[len("S_backbone.") :] in self.unused().state_dict()

    def inputs(self) -> list[dict[str, Any]]:
        """The recorded images, whose sizes are as the case says, with the recorded ground truth."""
        case, inputs = self.case, images_of(self.case)
        sizes = [list(x["image"].shape[-2:]) for x in inputs]
        assert sizes == (case.data["image_sizes"] if "image_sizes" in case.data else [case.data["image_size"]])
        for index, x in enumerate(inputs):
            if f"gt_boxes_{index}" in case.arrays:
                boxes, classes = case.tensor(f"gt_boxes_{index}"), case.tensor(f"gt_classes_{index}").long()
                x["instances"] = instances_of(x["image"].shape[-2:], boxes, classes)
        return inputs


def images_of(case: Case) -> list[dict[str, Any]]:
    return [{"image": case.tensor(f"image_{i}")} for i in range(sum(key.startswith("image_") for key in case.arrays))]


def in_our_names(case: Case, group: str, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The recorded tensors ``<group>.<published name>`` of a model, by our names."""
    found = {}
    for published, ours in prefixes.items():
        start = f"{group}.{published}"
        keys = [key for key in case.arrays if key.startswith(start)]
        tensors = {key[len(start) :]: case.tensor(key).float() for key in keys}
        found.update({f"{ours}{name}": value for name, value in head_names(tensors).items()})
    return found


def published_names(case: Case, prefix: str) -> list[str]:
    """Recorded parameters whose published names begin so."""
    names = [key[len("w.") :] for key in case.arrays if key.startswith(f"w.{prefix}")]
    return [name for name in names if not name.endswith(STATISTICS)]


def load(model: nn.Module, case: Case, prefixes: dict[str, str]) -> nn.Module:
    """All recorded weights but those of a level that the model does not have."""
    state = in_our_names(case, "w", prefixes)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {name.split(".")[-1] for name in missing} <= {"num_batches_tracked"}
    assert all(re.search(r"\.(?:conv|bn)\d\.\w+$", name) for name in unexpected) and len(state) > len(unexpected)
    return model

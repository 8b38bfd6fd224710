"""Runs of our detectors on what the localisation distillation suite recorded: maps, outputs and ground truth.

What the heads return is recorded, and the feature maps where features are imitated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import nn

from d2_distill.detectors import GFLv2
from d2_distill.detectors.criteria import FocalCenterness
from d2_distill.losses import quality_focal_loss
from d2_distill.staged import DenseRun

from .cases import Case
from .openmmlab import (
    BOX_LOSSES,
    RETINANET_ANCHORS,
    anchor_settings,
    build_given,
    given_run,
    instances_of,
    point_bounds,
)

# Of the levels 0, 1, .. and the last bin of distributions, where a case does not say otherwise.
STRIDES = (8, 16, 32, 64, 128)
REG_MAX = 16


@META_ARCH_REGISTRY.register()
class RecordedGFLv2(GFLv2):
    """GFLv2 with an output of its own for the scores, which are recorded as independent of the logits."""

    def class_scores(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs["scores"]


# Start of a case's name -> meta-architecture and its node below MODEL; the longest that fits.
_DETECTORS = {
    "gfl_loss": ("GFL", "GFL"),
    "ld_loss": ("GFL", "GFL"),
    "ldv2_loss": ("RecordedGFLv2", "GFL"),
    "ldatss_loss": ("ATSS", "ATSS"),
    "ldfcos_loss": ("OpenMMLabFCOS", "FCOS"),
    "ldretina_loss": ("OpenMMLabRetinaNet", "RETINANET"),
}


class RecordedRuns(NamedTuple):
    """
    Attributes:
        student, teacher: runs whose features and predictions are the recorded ones; no teacher in plain cases.
        leaves: recorded name of each input of the student without its "in_", e.g. "s_reg0" -> the float32
            tensor that requires the gradient recorded as "out_grad_s_reg0".
    """

    student: DenseRun
    teacher: DenseRun | None
    leaves: dict[str, torch.Tensor]


def maps_of(case: Case, key: str, requires_grad: bool = False) -> list[torch.Tensor]:
    """Recorded maps ``<key><level>`` of all levels, in float32."""
    names = [f"{key}{level}" for level in range(len(strides_of(case))) if f"{key}{level}" in case.arrays]
    return [case.tensor(name).float().requires_grad_(requires_grad) for name in names]


def strides_of(case: Case) -> Sequence[int]:
    params = case.data["params"]
    return list(params["strides"]) if "strides" in params else STRIDES


def recorded_runs(case: Case) -> RecordedRuns:
    """Runs of a case of training losses.

    Where no feature maps are recorded they are zeros. The student of ldv2_loss has its joint scores as an
    output "scores"; in the teacher these are its logits, which the published code compares with joint scores.
    """
    leaves = {
        name[len("in_"):]: case.tensor(name).float().requires_grad_()
        for name in case.arrays
        if name.startswith("in_s_")
    }
    constants = {name[len("in_"):]: case.tensor(name).float() for name in case.arrays if name.startswith("in_t_")}
    settings = detector_settings(case)
    student = _run(case, settings, "s", leaves)
    _check_fixed(case, student.staged.model)
    return RecordedRuns(student, _run(case, settings, "t", constants) if constants else None, leaves)


def _run(case: Case, settings: dict[str, Any], role: str, inputs: dict[str, torch.Tensor]) -> DenseRun:
    """The run of the student ("s") or the frozen one of the teacher ("t")."""
    strides = strides_of(case)
    maps = {
        what: [inputs[f"{role}_{what}{level}"] for level in range(len(strides))]
        for what in ("cls", "reg", "ctr", "feat", "x")
        if f"{role}_{what}0" in inputs
    }
    predictions = {"logits": maps["cls"], "deltas": maps["reg"]}
    if "ctr" in maps:
        predictions["centerness"] = maps["ctr"]
    architecture = _detector(case)[0]
    if architecture == "RecordedGFLv2":
        predictions.update({"logits": maps.get("feat", maps["cls"]), "scores": maps["cls"]})
    model = build_given(architecture, strides, settings, maps=maps.get("x", ()))
    return given_run(model, predictions, image_sizes(case), gt_instances(case), frozen=role == "t")


def _detector(case: Case) -> tuple[str, str]:
    return _DETECTORS[max((start for start in _DETECTORS if case.name.startswith(start)), key=len)]


def detector_settings(case: Case) -> dict[str, Any]:
    """Keys below MODEL, from the case's parameters."""
    params, (architecture, family) = case.data["params"], _detector(case)
    own: dict[str, Any] = {"NUM_CLASSES": params["num_classes"], "REG_MAX": params.get("reg_max", REG_MAX)}
    if "dfl_weight" in params:
        own["DFL_WEIGHT"] = params["dfl_weight"]
    if "focal" in params:
        own.update(FOCAL_LOSS_ALPHA=params["focal"]["alpha"], FOCAL_LOSS_GAMMA=float(params["focal"]["gamma"]))
    if "regress_ranges" in params:
        own["SIZES_OF_INTEREST"] = point_bounds(params["regress_ranges"])
        own["CENTER_SAMPLING_RADIUS"] = params["center_sample_radius"]
    others = {}
    if family == "RETINANET":
        others = anchor_settings(strides_of(case), **RETINANET_ANCHORS)
    if "box_loss" in params:
        loss, weight = _box_loss(params["box_loss"])
        prefix = "BBOX_REG_LOSS_" if family == "RETINANET" else "BOX_LOSS_"
        own["BBOX_REG_LOSS_TYPE" if family == "RETINANET" else "BOX_LOSS"] = loss
        if weight is not None:
            own[f"{prefix}WEIGHT"] = weight
    return {**others, **{f"{family}.{key}": value for key, value in own.items()}}


def _box_loss(text: str) -> tuple[str, float | None]:
    """Our name and the weight, if any, of "GIoULoss", "GIoU w2", "GIoU w1, weighted by centerness target"."""
    name, weight = re.fullmatch(r"(\w+?)(?:Loss)?(?: w([\d.]+))?(?:, .*)?", text).groups()
    return BOX_LOSSES[f"{name}Loss"], None if weight is None else float(weight)


def _check_fixed(case: Case, model: nn.Module) -> None:
    """What the parameters say of things that our detectors do not let one choose."""
    params = case.data["params"]
    if "box_loss" in params:
        _, _, remark = params["box_loss"].partition(", ")
        assert remark in ("", "weighted by centerness target")
        assert bool(remark) == isinstance(model.criterion, FocalCenterness)
    if "class_channels" in params:
        assert model.head.cls_score.out_channels == params["class_channels"]
    if "qfl_use_sigmoid" in params:
        scores = torch.full((1, 1, 1), 0.25)
        expected = quality_focal_loss(scores, scores * 0, from_logits=params["qfl_use_sigmoid"])
        on_logits = quality_focal_loss(scores, scores * 0, from_logits=model.criterion.on_logits)
        assert torch.equal(on_logits, expected)
    if "patched" in params:  # as there, an image without ground truth has no valuable region
        assert params["patched"] and not all(len(instances) for instances in gt_instances(case))


def image_sizes(case: Case) -> list[tuple[int, int]]:
    """(height, width) of each image, padded; where they are not recorded, those of the padded batch."""
    if "in_pad_shapes" in case.arrays:
        return [tuple(size) for size in case.arrays["in_pad_shapes"].tolist()]
    num_images, _, height, width = case.arrays["in_s_cls0"].shape
    stride = strides_of(case)[0]
    return [(height * stride, width * stride)] * num_images


def gt_instances(case: Case) -> list[Instances]:
    """The recorded ground truth, an entry an image."""
    return [
        instances_of(size, case.tensor(f"in_gt_bboxes{index}"), case.tensor(f"in_gt_labels{index}"))
        for index, size in enumerate(image_sizes(case))
    ]

"""Runs of our detectors on what the localisation distillation suite recorded: maps, outputs and ground truth.

The detectors are built from configs, as a user's are; only their backbone and what their heads return are
replaced by the recordings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.detectors import GFLv2
from d2_distill.detectors.anchor_order import to_size_outer
from d2_distill.detectors.building import build_detector, num_classes_key
from d2_distill.staged import DenseRun, stage_detector

from .cases import Case

STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 256
NUM_SIZES = NUM_RATIOS = 3


@BACKBONE_REGISTRY.register()
class RecordedPyramid(Backbone):
    """Returns ``maps``, one a level, for whatever images."""

    def __init__(self, cfg, input_shape) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.output_shape(), self.maps))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"p{level}": ShapeSpec(channels=CHANNELS, stride=stride)
            for level, stride in enumerate(STRIDES, start=3)
        }


@META_ARCH_REGISTRY.register()
class RecordedGFLv2(GFLv2):
    """GFLv2 with an output of its own for the scores, which are recorded as independent of the logits."""

    def class_scores(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs["scores"]


# Kind of case -> meta-architecture and overrides below MODEL.
_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ld_loss": ("GFL", {}),
    "ldv2_loss": ("RecordedGFLv2", {}),
    "ldatss_loss": ("ATSS", {"ATSS.REG_MAX": 16}),
    "ldfcos_loss": ("OpenMMLabFCOS", {"FCOS.REG_MAX": 16}),
    "ldretina_loss": (
        "OpenMMLabRetinaNet",
        {
            "RETINANET.REG_MAX": 16,
            "RETINANET.BBOX_REG_LOSS_TYPE": "giou",
            "RETINANET.BBOX_REG_LOSS_WEIGHT": 2.0,
            "ANCHOR_GENERATOR.SIZES": [
                [4 * stride * 2 ** (octave / NUM_SIZES) for octave in range(NUM_SIZES)] for stride in STRIDES
            ],
            "ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "ANCHOR_GENERATOR.OFFSET": 0.0,
        },
    ),
}


class RecordedRuns(NamedTuple):
    """
    Attributes:
        student, teacher: runs whose features and predictions are the recorded ones.
        leaves: recorded name of each input of the student without its "in_", e.g. "s_reg0" -> the float32
            tensor that requires the gradient recorded as "out_grad_s_reg0".
    """

    student: DenseRun
    teacher: DenseRun
    leaves: dict[str, torch.Tensor]


def recorded_runs(case: Case) -> RecordedRuns:
    """Runs of a case of kind ld_loss, ldv2_loss, ldatss_loss, ldfcos_loss or ldretina_loss.

    Where no feature maps are recorded they are zeros. The student of ldv2_loss has its joint scores as an
    output "scores"; in the teacher these are its logits, which the published code compares with joint scores.
    """
    kind = next(kind for kind in _DETECTORS if case.name.startswith(kind))
    leaves = {
        name[len("in_"):]: case.tensor(name).float().requires_grad_()
        for name in case.arrays
        if name.startswith("in_s_")
    }
    constants = {
        name[len("in_"):]: case.tensor(name).float() for name in case.arrays if name.startswith("in_t_")
    }
    return RecordedRuns(_run(case, kind, "s", leaves), _run(case, kind, "t", constants), leaves)


def _run(case: Case, kind: str, role: str, inputs: dict[str, torch.Tensor]) -> DenseRun:
    """The run of the student ("s") or the frozen one of the teacher ("t")."""
    maps = {
        what: [inputs[f"{role}_{what}{level}"] for level in range(len(STRIDES))]
        for what in ("cls", "reg", "ctr", "feat", "x")
        if f"{role}_{what}0" in inputs
    }
    predictions = {"logits": maps["cls"], "deltas": maps["reg"]}
    if "ctr" in maps:
        predictions["centerness"] = maps["ctr"]
    if kind == "ldv2_loss":
        predictions.update({"logits": maps.get("feat", maps["cls"]), "scores": maps["cls"]})
    if kind == "ldretina_loss":
        predictions = {
            output: [to_size_outer(x, NUM_SIZES, NUM_RATIOS, dim=1) for x in levels]
            for output, levels in predictions.items()
        }
    detector = case_detector(kind, case.data["params"]["num_classes"])
    zeros = [x.new_zeros(len(x), CHANNELS, *x.shape[2:]) for x in maps["cls"]]
    detector.backbone.maps = maps.get("x", zeros)

    num_images, _, height, width = maps["cls"][0].shape
    images = ImageList(
        torch.zeros(num_images, 3, height * STRIDES[0], width * STRIDES[0]), image_sizes(case)
    )
    run = stage_detector(detector).run(images, gt_instances(case), frozen=role == "t")
    run.__dict__["predictions"] = predictions  # where the stage keeps what it has computed
    return run


def case_detector(kind: str, num_classes: int) -> nn.Module:
    """The detector of a kind of case over a RecordedPyramid; its head has no tower."""
    name, overrides = _DETECTORS[kind]
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.BACKBONE.NAME = "RecordedPyramid"
    cfg.MODEL.DEVICE = "cpu"
    classes_key = num_classes_key(cfg)
    cfg.merge_from_list([classes_key, num_classes, classes_key.replace("NUM_CLASSES", "NUM_CONVS"), 0])
    cfg.merge_from_list([item for key, value in overrides.items() for item in (f"MODEL.{key}", value)])
    return build_detector(cfg)


def image_sizes(case: Case) -> list[tuple[int, int]]:
    """(height, width) of each image, padded; where they are not recorded, those of the padded batch."""
    if "in_pad_shapes" in case.arrays:
        return [tuple(size) for size in case.arrays["in_pad_shapes"].tolist()]
    num_images, _, height, width = case.arrays["in_s_cls0"].shape
    return [(height * STRIDES[0], width * STRIDES[0])] * num_images


def gt_instances(case: Case) -> list[Instances]:
    """The recorded ground truth, an entry an image."""
    return [
        Instances(
            size,
            gt_boxes=Boxes(case.tensor(f"in_gt_bboxes{index}")),
            gt_classes=case.tensor(f"in_gt_labels{index}"),
        )
        for index, size in enumerate(image_sizes(case))
    ]

"""What the CrossKD suite recorded of heads and methods, in our config keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from d2_distill.apps.conversion.openmmlab.heads import NUM_RATIOS, NUM_SIZES
from d2_distill.losses import kd_kl_div_loss

from .. import openmmlab
from ..cases import Case
from .crosskd_losses import delta_transform

HEADS = {"gfl": "GFLHead", "atss": "ATSSHead", "fcos": "FCOSHead", "retinanet": "RetinaHead"}
# What OpenMMLab's heads clamp decoded widths and heights at unless their coder says otherwise.
WH_RATIO_CLIP = 0.016


class PublishedHead:
    """OpenMMLab's ``head_config`` of a case, in our keys.

    Attributes:
        settings: below MODEL.
        loss_weights: our loss -> weight that no key of ours sets.
    """

    def __init__(self, case: Case) -> None:
        data, config = case.data, case.data["head_config"]
        self.family = {"gfl": "GFL", "atss": "ATSS", "fcos": "FCOS", "retinanet": "RETINANET"}[data["detector"]]
        assert config["type"] == HEADS[data["detector"]]
        for key in ("num_classes", "stacked_convs"):
            assert config[key] == data[key]
        assert config["in_channels"] == config["feat_channels"] == data["channels"]
        assert data["levels"] == len(data["strides"])
        self.groups = data["gn_groups"]
        if self.groups:
            assert config["norm_cfg"] == {"type": "GN", "num_groups": self.groups, "requires_grad": True}
        self.settings: dict[str, Any] = {}
        self._set(
            NUM_CLASSES=data["num_classes"], NUM_CONVS=data["stacked_convs"], NORM="GN" if self.groups else ""
        )
        self.loss_weights = {"loss_cls": config["loss_cls"]["loss_weight"]}
        assert config["loss_cls"]["use_sigmoid"]
        getattr(self, f"_{data['detector']}")(config, list(data["strides"]))

    def _set(self, **values: Any) -> None:
        self.settings.update({f"{self.family}.{key}": value for key, value in values.items()})

    def _gfl(self, config: Mapping[str, Any], strides: list[int]) -> None:
        assert config["loss_cls"]["type"] == "QualityFocalLoss"
        assert config["loss_dfl"]["type"] == "DistributionFocalLoss"
        self._set(
            QUALITY_BETA=config["loss_cls"]["beta"],
            DFL_WEIGHT=config["loss_dfl"]["loss_weight"],
            REG_MAX=config["reg_max"],
            NORMALIZER_FLOOR=1.0,  # of CrossKD's code
        )
        self._set_box_loss(config)
        self._set_square_anchors(config["anchor_generator"], strides)

    def _atss(self, config: Mapping[str, Any], strides: list[int]) -> None:
        self._set_focal_loss(config)
        self._set_box_loss(config)
        self._set_centerness(config)
        self._set_square_anchors(config["anchor_generator"], strides)
        self._set(BBOX_REG_WEIGHTS=_delta_weights(config["bbox_coder"]))

    def _fcos(self, config: Mapping[str, Any], strides: list[int]) -> None:
        assert config["strides"] == strides
        self._set_focal_loss(config)
        self._set_box_loss(config)
        self._set_centerness(config)
        radius = config.get("center_sample_radius", 1.5) if config.get("center_sampling") else 0.0
        self._set(
            SIZES_OF_INTEREST=openmmlab.point_bounds(config["regress_ranges"]),
            CENTER_SAMPLING_RADIUS=radius,
            DISTANCES="relu" if config.get("norm_on_bbox") else "exp",
            CENTERNESS_ON="box" if config.get("centerness_on_reg") else "cls",
        )

    def _retinanet(self, config: Mapping[str, Any], strides: list[int]) -> None:
        anchors = config["anchor_generator"]
        assert anchors["type"] == "AnchorGenerator" and anchors["strides"] == strides
        # The converter of heads knows the order of so many anchors only.
        assert (anchors["scales_per_octave"], len(anchors["ratios"])) == (NUM_SIZES, NUM_RATIOS)
        self.settings.update(openmmlab.anchor_settings(
            strides, anchors["octave_base_scale"], anchors["scales_per_octave"], anchors["ratios"]
        ))
        self._set_focal_loss(config)
        loss = config["loss_bbox"]
        self._set(
            BBOX_REG_LOSS_TYPE=openmmlab.BOX_LOSSES[loss["type"]],
            BBOX_REG_LOSS_WEIGHT=loss["loss_weight"],
            BBOX_REG_WEIGHTS=_delta_weights(config["bbox_coder"]),
        )

    def _set_focal_loss(self, config: Mapping[str, Any]) -> None:
        loss = config["loss_cls"]
        assert loss["type"] == "FocalLoss"
        self._set(FOCAL_LOSS_ALPHA=loss["alpha"], FOCAL_LOSS_GAMMA=loss["gamma"])

    def _set_box_loss(self, config: Mapping[str, Any]) -> None:
        loss = config["loss_bbox"]
        self._set(BOX_LOSS=openmmlab.BOX_LOSSES[loss["type"]], BOX_LOSS_WEIGHT=loss["loss_weight"])

    def _set_centerness(self, config: Mapping[str, Any]) -> None:
        loss = config["loss_centerness"]
        assert loss["type"] == "CrossEntropyLoss" and loss["use_sigmoid"]
        self.loss_weights["loss_centerness"] = loss["loss_weight"]

    def _set_square_anchors(self, anchors: Mapping[str, Any], strides: list[int]) -> None:
        assert anchors["type"] == "AnchorGenerator" and anchors["strides"] == strides
        assert anchors["scales_per_octave"] == 1 and anchors["ratios"] == [1.0]  # as our detectors' anchors are
        self._set(ANCHOR_SCALE=anchors["octave_base_scale"])


def _delta_weights(coder: Mapping[str, Any]) -> tuple[float, ...]:
    assert coder["type"] == "DeltaXYWHBBoxCoder"
    return delta_transform(coder["target_means"], coder["target_stds"], WH_RATIO_CLIP).weights


def distill_settings(case: Case) -> dict[str, Any]:
    """Keys below MODEL.DISTILL: CrossKD's and, where it was recorded, PKD's."""
    options = case.data["kd_cfg"]
    classes, box = options["loss_cls_kd"], options["loss_reg_kd"]
    assert classes["type"] == "KDQualityFocalLoss"
    settings = {
        "METHODS": ("CrossKD",),
        "CROSSKD.CLS_TAP": options["reused_teacher_head_idx"],
        "CROSSKD.BOX_TAP": options["reused_teacher_head_idx"],
        # What is tapped in front of an activation that works in place is what it leaves there.
        "CROSSKD.TAP_ACTIVATION": "post" if case.data["relu_inplace"] else "pre",
        "CROSSKD.CLS_WEIGHT": classes["loss_weight"],
        "CROSSKD.CLS_BETA": float(classes["beta"]),
        "CROSSKD.BOX_WEIGHT": box["loss_weight"],
        "CROSSKD.NORMALIZER_FLOOR": 1e-6,  # of the published code
    }
    if box["type"] == "KnowledgeDistillationKLDivLoss":
        # The method takes the divergence as its loss has it by default.
        assert box["class_reduction"] == inspect.signature(kd_kl_div_loss).parameters["class_reduction"].default
        settings.update({"CROSSKD.BOX_LOSS": "kl", "CROSSKD.BOX_TEMPERATURE": float(box["T"])})
    else:
        name = box["type"]
        settings["CROSSKD.BOX_LOSS"] = openmmlab.BOX_LOSSES[(name, box["mode"]) if "mode" in box else name]
    if "loss_center_kd" in options:
        centerness = options["loss_center_kd"]
        assert centerness["type"] == "CrossEntropyLoss" and centerness["use_sigmoid"]
        settings["CROSSKD.CENTERNESS_WEIGHT"] = centerness["loss_weight"]
    if "loss_feat_kd" in options:
        assert options["loss_feat_kd"]["type"] == "PKDLoss"
        settings.update({"METHODS": ("CrossKD", "PKD"), "PKD.WEIGHT": options["loss_feat_kd"]["loss_weight"]})
    return settings

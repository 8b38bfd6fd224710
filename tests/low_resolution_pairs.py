"""Small teachers on two resolutions, and the students that read the lower one."""

from __future__ import annotations

from typing import Any

STAGES = ["res2", "res3", "res4", "res5"]
# Factor -> what the heads read, and what a pyramid of the whole image has above P5.
LEVELS = {2: ["p3", "p4", "p5", "p6"], 4: ["p4", "p5", "p6", "p7"]}
TOP_BLOCKS = {2: "P6", 4: "P6P7"}
PYRAMID = "build_mobilenet_v2_fpn_backbone"
INHERIT = ("backbone.pyramid=detector.backbone", "head=detector.head")


def _common(factor: int) -> dict[str, Any]:
    return {
        "MOBILENETV2__WIDTH_MULT": 0.125,
        "MOBILENETV2__OUT_STAGES": (1, 2, 4, 6),
        "FPN__IN_FEATURES": STAGES,
        "ANCHOR_GENERATOR__SIZES": [[16, 24], [32, 48], [64, 96], [96, 128]],
        "FCOS__SIZES_OF_INTEREST": [24, 48, 96],
        "FCOS__DISTANCES": "relu",
        "FCOS__CENTERNESS_ON": "box",
        **{f"{family}__IN_FEATURES": LEVELS[factor] for family in ("RETINANET", "FCOS", "ATSS", "GFL", "TOOD")},
    }


def of_teacher(detector: str = "OpenMMLabFCOS", factor: int = 2) -> dict[str, Any]:
    """Overrides of the case "MultiScaleDetector"."""
    return {
        **_common(factor),
        "BACKBONE__NAME": PYRAMID,
        "FPN__TOP_BLOCK": TOP_BLOCKS[factor],
        "MSAD__DETECTOR": detector,
        "MSAD__FACTOR": factor,
    }


def of_student(factor: int = 2) -> dict[str, Any]:
    """Overrides of the case of a one-stage detector; its levels are those of the teacher's low resolution."""
    return {
        **_common(factor),
        "BACKBONE__NAME": "build_low_resolution_backbone",
        "LOW_RESOLUTION__BACKBONE": PYRAMID,
        "LOW_RESOLUTION__FACTOR": factor,
        "FPN__TOP_BLOCK": "",
    }

"""What a user of an exported file must know: input, resizing, classes, outputs."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ...data.classes import dataset_classes
from ...detectors.building import plain_config
from ...staged import stage_detector

FORMAT = "d2_distill export 1"


def describe_model(
    cfg: CfgNode, model: nn.Module, output_names: tuple[str, ...], *, raw: bool, fixed_size: tuple[int, int] | None
) -> dict[str, Any]:
    """Values that JSON can hold, in the file's metadata; the keys are explained in docs/shipping.md.

    Args:
        cfg: of the detector, distilled or not.
        fixed_size: (H, W) of every image; None if it is free.
    """
    staged = stage_detector(model)
    height, width = fixed_size or ("H", "W")
    description = {
        "format": FORMAT,
        "detector": plain_config(cfg).MODEL.META_ARCHITECTURE,
        "class_names": dataset_classes(cfg),
        "num_classes": staged.num_classes,
        "input": "image",
        "input_type": "uint8",
        "input_shape": ["N" if raw else 1, 3, height, width],
        "channel_order": cfg.INPUT.FORMAT,
        "min_size_test": cfg.INPUT.MIN_SIZE_TEST,
        "max_size_test": cfg.INPUT.MAX_SIZE_TEST,
        "fixed_size": list(fixed_size) if fixed_size else None,
        "pad_value": [round(value) for value in cfg.MODEL.PIXEL_MEAN],
        "size_divisibility": staged.size_divisibility,
        "outputs": list(output_names),
        "post_processing": not raw,
        "torch": str(torch.__version__),
    }
    if not raw:
        description["score_threshold"] = staged.score_threshold
        description["max_detections"] = cfg.TEST.DETECTIONS_PER_IMAGE
    return description

"""What a checkpoint's tensors do not tell, from the text of the config that it was trained with."""

from __future__ import annotations

import re
from typing import Any

from .. import TORCHVISION_STYLE

# Of the backbone's ImageNet weights. "pytorch": torchvision's. "caffe": the stride is in the first 1x1
# convolution, images are BGR, batch norms are frozen; Detectron and Detectron2 subtract other means.
STYLES: dict[str, dict[str, Any]] = {
    "pytorch": TORCHVISION_STYLE,
    "caffe-detectron": {
        "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    },
    "caffe-detectron2": {
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    },
}


def settings_of_text(text: str) -> dict[str, Any]:
    """Our config keys for what the text says without contradiction.

    Texts of early versions hold base configs, too, whose values the last one overrides; that is not followed.
    """
    to_rgb = _agreed(r"\b(?:bgr_)?to_rgb\s*=\s*(\w+)", text)
    style = _agreed(r"\bstyle\s*=\s*['\"](\w+)['\"]", text)
    found = {
        "MODEL.PIXEL_MEAN": _numbers("mean", text),
        "MODEL.PIXEL_STD": _numbers("std", text),
        "INPUT.FORMAT": {"True": "RGB", "False": "BGR"}.get(to_rgb),
        "MODEL.RESNETS.STRIDE_IN_1X1": {"pytorch": False, "caffe": True}.get(style),
    }
    if re.search(r"\bneck\s*=", text):
        found["MODEL.FPN.TOP_BLOCK_RELU"] = _switch("relu_before_extra_convs", text)
    return {key: value for key, value in found.items() if value is not None}


def fcos_settings_of_text(text: str) -> dict[str, Any]:
    """Our config keys for what the text says of FCOS's head; options that it does not name are off."""
    if not re.search(r"\bbbox_head\s*=", text):
        return {}
    on_box = {False: "cls", True: "box"}.get(_switch("centerness_on_reg", text))
    distances = {False: "exp", True: "relu"}.get(_switch("norm_on_bbox", text))
    radius = {False: 0.0, True: float(_agreed(r"\bcenter_sample_radius\s*=\s*([\d.]+)", text) or 1.5)}
    found = {
        "MODEL.FCOS.CENTERNESS_ON": on_box,
        "MODEL.FCOS.DISTANCES": distances,
        "MODEL.FCOS.CENTER_SAMPLING_RADIUS": radius.get(_switch("center_sampling", text)),
    }
    return {key: value for key, value in found.items() if value is not None}


def _agreed(pattern: str, text: str) -> str | None:
    """What the pattern's group matches, if it is the same everywhere; whitespace aside."""
    found = {re.sub(r"\s+", "", value) for value in re.findall(pattern, text)}
    return found.pop() if len(found) == 1 else None


def _switch(name: str, text: str) -> bool | None:
    """Value of a bool option, False if the text does not name it, None if it has both values."""
    found = set(re.findall(rf"\b{name}\s*=\s*(True|False)\b", text))
    return None if len(found) == 2 else "True" in found


def _numbers(name: str, text: str) -> list[float] | None:
    """Value of a list of three numbers."""
    found = _agreed(rf"\b{name}\s*=\s*[\[(]([-\d.,\s]+)[\])]", text) or ""
    values = [float(value) for value in found.split(",") if value]
    return values if len(values) == 3 else None

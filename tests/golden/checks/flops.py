"""Multiply-adds of small models: our count, and those of the operators that it leaves out."""

from __future__ import annotations

import re

import torch
from fvcore.nn import FlopCountAnalysis

from d2_distill.evaluation.complexity import count_flops, flops_by_module

from ..cases import Case, fill_parameters, load
from .d2_models import described_model

# The counts were recorded with 50 proposals, where the models' own recording has 60: the linear layers
# take 105472 multiply-adds a proposal, and 50 of these are the recorded number.
OVERRIDES = ["MODEL.RPN.POST_NMS_TOPK_TEST", 50]
# What our count is of.
COUNTED = ("conv", "linear")


def check_flops(case: Case) -> None:
    """Ours is of convolutions and linear layers; the others are all in the backbone, where fvcore counts them."""
    channels, height, width, salt = re.fullmatch(
        r"(\d+)x(\d+)x(\d+) zeros, parameters filled with salt (\d+); FlopCountAnalysis of detectron2.utils.analysis",
        case.data["input"],
    ).groups()
    image = torch.zeros(int(channels), int(height), int(width))
    for model_name, expected in case.data["results"].items():
        model = described_model(load("detectron2", f"models/{model_name}").data["description"], OVERRIDES)
        fill_parameters(model, int(salt))
        recorded = dict(expected["by_operator"])
        counted = count_flops(model, [{"image": image}])
        assert counted == sum(recorded.pop(operator, 0) for operator in COUNTED), model_name
        others = backbone_flops(model, image)
        assert {name: count for name, count in others.items() if name not in COUNTED} == recorded, model_name
        assert counted + sum(recorded.values()) == expected["total"], model_name
        if expected["backbone"] is not None:
            assert flops_by_module(model, [{"image": image}])["backbone"] == expected["backbone"]


@torch.no_grad()
def backbone_flops(model: torch.nn.Module, image: torch.Tensor) -> dict[str, int]:
    """Multiply-adds by operator, without those that have none."""
    images = model.preprocess_image([{"image": image}])
    analysis = FlopCountAnalysis(model.eval().backbone, images.tensor)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return {name: int(count) for name, count in analysis.by_operator().items() if count}


CHECKS = {"flops": check_flops}

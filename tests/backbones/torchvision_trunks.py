"""Configs and checks that the trunks of torchvision share."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.layers.memory_format import in_fast_layout

from ..small_detectors import batch, build, detector_cfg

FEATURES = ["res3", "res4", "res5"]


def retinanet_cfg(builder: str, **overrides: Any) -> CfgNode:
    """RetinaNet on such a backbone, whose features are res3 to res5; overrides as for ``detector_cfg``."""
    return detector_cfg("RetinaNet", **{"BACKBONE__NAME": builder, "FPN__IN_FEATURES": FEATURES, **overrides})


def trunk(builder: str, **overrides: Any) -> nn.Module:
    """The part below the pyramid, in training mode."""
    return build(retinanet_cfg(builder, **overrides)).backbone.bottom_up


def diversify(model: nn.Module) -> nn.Module:
    """Random values for all that starts as zeros or ones."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            low = 0.5 if name.endswith(("weight", "running_var")) else -0.5
            tensor.data.uniform_(low, low + 1)
    return model


def frozen_layers(model: nn.Module) -> list[int]:
    """Numbers of the layers in ``features`` without any trainable parameter."""
    return [
        index for index, layer in enumerate(model.features) if not any(p.requires_grad for p in layer.parameters())
    ]


def assert_every_parameter_is_trained(cfg: CfgNode) -> None:
    """A step on the losses of a detector, in the memory format of training, reaches all trainable parameters.

    The detector reads P3 to P7, so that none of these lacks a gradient.
    """
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [96], [128]]
    model = in_fast_layout(build(cfg).train())
    with EventStorage():
        losses = model(batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        else:
            assert parameter.grad is None, name


def assert_channels_last_computes_the_same(model: nn.Module) -> None:
    image = torch.rand(2, 3, 64, 96)
    model.eval()
    with torch.no_grad():
        expected = model(image)
        found = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    for name, feature in expected.items():
        torch.testing.assert_close(found[name], feature, rtol=1e-4, atol=1e-4)
        assert found[name].is_contiguous(memory_format=torch.channels_last), name

"""Every method under autocast: terms in float32, and finite gradients."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.distiller import Distiller

from ..small_detectors import batch, distiller_cfg, save_teacher


@pytest.mark.parametrize(
    "case, methods",
    [
        ("RetinaNet", ["CrossKD", "PKD", "FeatureImitation", "HEAD"]),
        ("GFL", ["LD", "CrossKD"]),
        ("TOOD", ["CrossKD", "PKD", "HEAD"]),
        ("GeneralizedRCNN", ["CrossKDRoI", "HEAD"]),
    ],
)
def test_terms_are_taken_in_float32(case, methods, tmp_path):
    torch.manual_seed(0)
    model = build_model(distiller_cfg(case, save_teacher(tmp_path, case), methods)).train()
    assert isinstance(model, Distiller)
    with EventStorage(3000), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch())
    terms = {name for method in model.methods.values() for name in method.weights}
    assert terms < losses.keys()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

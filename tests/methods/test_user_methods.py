"""The methods of examples/, as files of a user's own, on pairs of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2_distill.config.user_code import import_file

from ..small_detectors import batch, distiller_cfg, save_teacher

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = [("RetinaNet", "GFL"), ("GFL", "GeneralizedRCNN"), ("GeneralizedRCNN", "GeneralizedRCNN cascade")]


@pytest.mark.parametrize("student, teacher", PAIRS)
@pytest.mark.parametrize("method, file", [("FGD", "focal_global.py"), ("CWD", "channel_wise.py")])
def test_every_term_and_module_learns(method, file, student, teacher, tmp_path):
    example = import_file(str(EXAMPLES / file))
    cfg = distiller_cfg(student, save_teacher(tmp_path, teacher), [method])
    example.add_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).prepare_training().train()
    own = model.methods[method]
    with EventStorage():
        losses = model(batch())
        terms = [losses[name] for name in own.weights]
        assert set(own.weights) == set(own.WEIGHT_KEYS) and all(term.isfinite() and term > 0 for term in terms)
        gradients = torch.autograd.grad(sum(terms), list(model.student.backbone.parameters()), allow_unused=True)
        sum(model(batch()).values()).backward()
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_method_of_a_whole_paper_is_a_short_file():
    assert len((EXAMPLES / "focal_global.py").read_text().splitlines()) <= 70

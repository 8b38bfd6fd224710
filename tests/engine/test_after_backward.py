"""Hooks of the trainer see the gradients of a step, before the weights change."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from d2_distill.data.registration import register_datasets
from d2_distill.engine.trainer import Trainer

from ..data.small_sets import small_cfg, write_coco


class Brightness(nn.Module):
    """Learns how bright images are, on average."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, batched_inputs):
        errors = [self.value - inputs["image"].float().mean() / 255 for inputs in batched_inputs]
        return {"loss": torch.cat(errors).square().mean()}


class Watch(HookBase):
    def __init__(self):
        self.seen = []

    def after_backward(self):
        value = self.trainer.model.value
        self.seen.append((self.trainer.iter, value.item(), value.grad.item()))


@pytest.mark.parametrize("parts", [1, 2])
def test_hooks_see_the_gradients_of_each_step(tmp_path, parts):
    row = write_coco(tmp_path)
    cfg = small_cfg(
        DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), DATASETS__TEST=(), OUTPUT_DIR=str(tmp_path / "out"),
        SOLVER__MAX_ITER=3, SOLVER__ACCUMULATION_STEPS=parts, SOLVER__STEPS=(), MODEL__DEVICE="cpu",
    )
    register_datasets(cfg)
    trainer, watch = Trainer(cfg, Brightness()), Watch()
    trainer.register_hooks([watch])
    trainer.train()
    assert [step for step, _, _ in watch.seen] == [0, 1, 2] and watch.seen[0][1] == 0
    assert all(gradient < 0 for _, _, gradient in watch.seen) and watch.seen[1][1] < watch.seen[2][1]

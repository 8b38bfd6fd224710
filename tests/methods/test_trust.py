"""The teacher's loss on the labels beside the student's."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2_distill.methods.trust import losses_on_labels, outputs_alike
from d2_distill.staged import stage_detector

from ..small_detectors import batch, build, detector_cfg, save_teacher
from ..test_distiller import build_distiller


def staged(case):
    return stage_detector(build(detector_cfg(case)).train())


@pytest.mark.parametrize("case", ["RetinaNet", "GFL", "OpenMMLabFCOS", "ATSS"])
def test_equal_detectors_have_equal_losses(case):
    ours, theirs = staged(case), staged(case)
    assert outputs_alike(ours, theirs)
    theirs.model.load_state_dict(ours.model.state_dict())
    inputs = batch()
    with EventStorage() as storage:
        images = ours.preprocess(inputs)
        run = ours.run(images, [x["instances"] for x in inputs])
        first = sum(run.losses.values())
        normalizer = getattr(ours.innermost, "loss_normalizer", None)
        losses = losses_on_labels(run, theirs.run(images, frozen=True))
    assert getattr(ours.innermost, "loss_normalizer", None) == normalizer
    assert losses["student"] == first.item()
    # Detectron2's own detectors divide by a running mean, which the second evaluation has moved.
    assert losses["teacher"] == pytest.approx(losses["student"], rel=0.15 if normalizer else 1e-6)
    assert not any(name.startswith("total_loss") for name in storage.latest())


@pytest.mark.parametrize(
    "pair", [("RetinaNet", "GFL"), ("GFL", "GeneralizedRCNN"), ("ATSS", "ATSS distributions"), ("GeneralizedRCNN",) * 2]
)
def test_others_are_not_compared(pair):
    assert not outputs_alike(*map(staged, pair))


def test_a_teacher_that_is_worse_than_its_student_falls_silent(tmp_path):
    """Here it is the student that was trained."""
    teacher = save_teacher(tmp_path, "GFL")
    model = build_distiller("GFL", teacher, ["PKD"], DISTILL__BALANCE="auto", DISTILL__BALANCE_PERIOD=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    said = []
    with EventStorage() as storage:
        for iteration in range(40):
            storage.iter = iteration
            losses = model(batch())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            said.append(model.balance.say)
    assert said[-1] < 0.05

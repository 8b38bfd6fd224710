"""Every detector and every method under autocast: terms in float32, and a finite gradient for every parameter."""

from __future__ import annotations

import functools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2_distill.distiller import Distiller
from d2_distill.methods import list_methods, refusals
from d2_distill.staged import stage_detector
from d2_distill.teacher import Teacher

from ..small_detectors import CASES, ONE_STAGE, batch, build, detector_cfg, distiller_cfg, save_teacher
from .test_build import OURS

RCNN = "GeneralizedRCNN"
PAIRS = [*((case, case) for case in CASES), *((case, RCNN) for case in ONE_STAGE)]
# Of the R-CNN assistants of HEAD and TFHEAD.
ROIS = {
    "ROI_HEADS__NAME": "StandardROIHeads",
    "ROI_HEADS__BATCH_SIZE_PER_IMAGE": 8,
    "ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "ROI_BOX_HEAD__NUM_FC": 2,
    "ROI_BOX_HEAD__FC_DIM": 16,
    "RPN__PRE_NMS_TOPK_TRAIN": 50,
    "RPN__POST_NMS_TOPK_TRAIN": 20,
}


def options_of(case: str) -> dict:
    """Keys of a student's methods."""
    assistant = "OpenMMLabFCOS" if case.startswith("GFL") else "GFLv2"
    return {**(ROIS if case in ONE_STAGE else {}), "DISTILL__TF_HEAD__DENSE_ASSISTANT": assistant}


@functools.lru_cache(maxsize=None)
def serving(case: str, teacher_case: str) -> list[str]:
    """The methods that accept a student and a teacher of these cases."""
    student, teacher_cfg = build(detector_cfg(case)), detector_cfg(teacher_case)
    teacher = Teacher(build(teacher_cfg), input_format="BGR", cfg=teacher_cfg)
    found = refusals(distiller_cfg(case, None, **options_of(case)), stage_detector(student), teacher)
    return [name for name, refusal in found.items() if refusal is None and name in OURS]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Saved teachers by case, made when they are first asked for."""
    saved = {}

    def teacher(case: str):
        if case not in saved:
            saved[case] = save_teacher(tmp_path_factory.mktemp("teacher"), case)
        return saved[case]

    return teacher


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Losses of a step under autocast, whose gradients are checked."""
    with EventStorage(3000), torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(batch())
    assert {name for name, loss in losses.items() if loss.dtype != torch.float32 or not loss.isfinite()} == set()
    sum(losses.values()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert [name for name, gradient in trained.items() if not gradient.isfinite().all()] == []
    return losses


@pytest.mark.parametrize("case", CASES)
def test_detectors_train(case):
    train_step(build(detector_cfg(case)))


@pytest.mark.parametrize("case, teacher_case", PAIRS)
def test_students_of_every_method_train(case, teacher_case, teachers):
    methods = serving(case, teacher_case)
    torch.manual_seed(0)
    model = build_model(distiller_cfg(case, teachers(teacher_case), methods, **options_of(case))).prepare_training()
    assert isinstance(model, Distiller) and list(model.methods) == methods
    terms = {name for method in model.methods.values() for name in method.weights}
    assert terms and terms < train_step(model).keys()


def test_every_method_has_a_pair():
    """So that none is left out above."""
    assert {name for pair in PAIRS for name in serving(*pair)} == set(OURS) & set(list_methods())

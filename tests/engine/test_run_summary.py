"""What a run says about itself before it starts, and what it warns of."""

from __future__ import annotations

import logging

import pytest
import torch

from d2_distill.config.keys import get_distill_cfg
from d2_distill.data.loader import check_batch
from d2_distill.data.registration import register_datasets
from d2_distill.engine.run_summary import Cost, log_summary, passes, schedules_of, warnings_of
from d2_distill.errors import UserError
from d2_distill.methods.schedules import build_schedule, last_iteration

from ..data.small_sets import small_cfg, write_coco
from ..small_detectors import build, detector_cfg, save_teacher
from ..test_distiller import build_distiller


def run_cfg(**keys):
    """A run without anything to warn of on 100 images."""
    cfg = get_distill_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (192,), 192
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 1000, 4, (800,), 100
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def warned(images=100, schedules=None, student=None, teacher=None, **keys):
    return list(warnings_of(run_cfg(**keys), images, schedules=schedules or {}, student=student, teacher=teacher))


SMALL, LARGE = Cost(1_000_000, 2_000_000_000), Cost(5_000_000, 9_000_000_000)


def test_nothing_to_warn_of():
    assert warned() == warned(schedules={"MODEL.DISTILL.PKD.SCHEDULE": 1000}, student=SMALL, teacher=LARGE) == []
    # Several training sizes, of which the nearest counts.
    assert warned(INPUT__MIN_SIZE_TRAIN=(480, 800), INPUT__MIN_SIZE_TEST=640) == []


@pytest.mark.parametrize(
    "arguments, start",
    [
        ({"INPUT__MIN_SIZE_TEST": 800}, "INPUT.MIN_SIZE_TEST is 800, but the training sees images of INPUT.MIN_SIZE_TRAIN (192,)"),
        ({"INPUT__MIN_SIZE_TEST": 100}, "INPUT.MIN_SIZE_TEST is 100"),
        ({"SOLVER__WARMUP_ITERS": 1000}, "SOLVER.WARMUP_ITERS is 1000, but the run ends after 1000"),
        ({"SOLVER__STEPS": (800, 1000)}, "SOLVER.STEPS has 1000, but the run ends after 1000"),
        ({"schedules": {"MODEL.DISTILL.HEAD.AKD_SCHEDULE": 2000}}, "MODEL.DISTILL.HEAD.AKD_SCHEDULE has the iteration 2000, but the run ends"),
        ({"student": LARGE, "teacher": SMALL}, "The student has no fewer parameters than its teacher (5.00 M parameters, 9 GFLOPs"),
        ({"student": Cost(1, 10**10), "teacher": LARGE}, "The student has no fewer GFLOPs than its teacher"),
        ({"images": 10}, "SOLVER.MAX_ITER 1000 with IMS_PER_BATCH 4 means 400 passes over the 10 training images; lower MAX_ITER"),
        ({"images": 2000}, "SOLVER.MAX_ITER 1000 with IMS_PER_BATCH 4 means 2 passes over the 2000 training images; raise MAX_ITER"),
    ],
)
def test_one_sentence_each(arguments, start):
    [sentence] = warned(**arguments)
    assert sentence.startswith(start) and sentence.endswith(".") and ";" in sentence


def test_passes_do_not_depend_on_the_number_of_processes():
    assert passes(run_cfg(SOLVER__REFERENCE_WORLD_SIZE=8), 100) == passes(run_cfg(), 100) == 40


def test_last_iteration():
    schedule = build_schedule([["Warmup", 0.02], ["EarlyStop", 650]], run_length=1000)
    assert last_iteration(schedule) == 650
    assert last_iteration(build_schedule([])) == last_iteration(lambda iteration: 1.0) == 0


def test_log(tmp_path, caplog):
    wide = save_teacher(tmp_path, "RetinaNet", RESNETS__RES2_OUT_CHANNELS=32)
    model = build_distiller("RetinaNet", wide, ["PKD"], DISTILL__PKD__SCHEDULE=[["Warmup", 5000]])
    state, training = torch.get_rng_state(), model.training
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        log_summary(run_cfg(INPUT__MIN_SIZE_TRAIN=(96,), INPUT__MIN_SIZE_TEST=96), model, images=100)
    assert torch.equal(torch.get_rng_state(), state) and model.training == training
    assert not model.teacher.model.training
    [summary] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("The run: ")]
    assert summary.startswith("The run: 40 passes over 100 images (1000 iterations); student ")
    assert "for an image of 96 x 128 px; teacher " in summary and summary.count("GFLOPs") == 2
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("MODEL.DISTILL.PKD.SCHEDULE has the iteration 5000, but the run ends after 1000")
    assert schedules_of(model.methods) == {"MODEL.DISTILL.PKD.SCHEDULE": 5000}


def test_cost_of_a_large_image_is_that_of_its_area():
    model = build(detector_cfg("GFL"))
    model.backbone.eval()  # as with batch norms that are fixed
    small, large = Cost.of(model, (256, 256)), Cost.of(model, (512, 1024))
    assert large.flops == 8 * small.flops and large.parameters == small.parameters
    assert model.training and not model.backbone.training


def test_a_plain_detector(caplog):
    with caplog.at_level(logging.INFO, logger="d2_distill"):
        log_summary(run_cfg(INPUT__MIN_SIZE_TRAIN=(96,), INPUT__MIN_SIZE_TEST=96), build(detector_cfg("GFL")), images=100)
    assert "; detector " in caplog.text and "teacher" not in caplog.text


def test_a_batch_larger_than_the_data(tmp_path):
    row = write_coco(tmp_path)
    cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), SOLVER__IMS_PER_BATCH=4)
    register_datasets(cfg, names=(row[0],))
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH is 4, but DATASETS.TRAIN has 3 images to train on; lower it to 3"):
        check_batch(cfg)

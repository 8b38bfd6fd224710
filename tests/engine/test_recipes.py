"""What published recipes ask of Detectron2's SOLVER and INPUT keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.solver import build_lr_scheduler
from torch import nn

from d2_distill.config.keys import get_distill_cfg
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.layers.fixed_batch_norm import FixedBatchNorm2d


def config(*opts):
    cfg = get_distill_cfg()
    cfg.merge_from_list(opts)
    return cfg


def rates(*opts, count: int):
    """Learning rates of the first iterations."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = build_lr_scheduler(config("SOLVER.BASE_LR", 0.01, *opts), optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


WARM_UP = ("SOLVER.WARMUP_FACTOR", 0.001, "SOLVER.WARMUP_ITERS", 500, "SOLVER.MAX_ITER", 900)


def test_warm_up_and_steps():
    """OpenMMLab's linear warm-up of 500 iterations from a thousandth of the rate."""
    found = rates(*WARM_UP, "SOLVER.STEPS", (600, 800), count=900)
    expected = [0.01 * (1 - (1 - i / 500) * (1 - 0.001)) for i in range(500)]
    expected += [0.01] * 100 + [0.001] * 200 + [0.0001] * 100
    assert found == pytest.approx(expected, rel=1e-6)


def test_warm_up_and_cosine():
    cosine = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 0.0001)
    found = rates(*WARM_UP, *cosine, count=900)
    assert found[0] == pytest.approx(1e-5)
    expected = [0.0001 + 0.0099 * (1 + math.cos(math.pi * i / 900)) / 2 for i in range(900)]
    assert found[500:] == pytest.approx(expected[500:], rel=1e-6)
    assert all(before < after for before, after in zip(found[:499], found[1:500]))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("of_norms", [0.0, 0.0001])
def test_weight_decay_of_norms(name, of_norms):
    """Norms of every kind have their own weight decay; all other parameters have the common one."""
    norms = [nn.BatchNorm2d(2), FixedBatchNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2)]
    convs = [nn.Conv2d(2, 2, 1), nn.Linear(2, 2)]
    decays = ("SOLVER.WEIGHT_DECAY", 0.0001, "SOLVER.WEIGHT_DECAY_NORM", of_norms)
    cfg = config("SOLVER.OPTIMIZER", name, *decays)
    optimizer = build_optimizer(cfg, nn.ModuleList(norms + convs))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for modules, expected in ((norms, of_norms), (convs, 0.0001)):
        found = [decay.pop(id(parameter)) for module in modules for parameter in module.parameters()]
        assert found and set(found) == {expected}
    assert not decay


def test_images_of_a_range_of_sizes():
    """The short side is any whole number of the range; the long one is bounded, and the aspect kept."""
    cfg = config("INPUT.MIN_SIZE_TRAIN", (640, 800), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    augmentation = AugmentationList(build_augmentation(cfg, is_train=True))
    np.random.seed(0)

    def size_of(height: int, width: int):
        image = AugInput(np.zeros((height, width, 3), dtype=np.uint8))
        augmentation(image)
        return image.image.shape[:2]

    sizes = [size_of(60, 80) for _ in range(60)]
    shorter = {height for height, _ in sizes}
    assert min(shorter) >= 640 and max(shorter) <= 800
    assert len(shorter) > 30 and min(shorter) < 680 and max(shorter) > 760
    assert all(abs(width - height * 4 / 3) <= 1 for height, width in sizes)
    assert size_of(40, 160) == (333, 1333)

#!/usr/bin/env python3
"""Measures what distillation costs a training step.

    python tools/benchmark.py --config-file configs/quickstart/distilled.yaml --image-size 256 256 --batch-size 2

Three arms run interleaved in one process on one synthetic batch: a step of the plain student, the forward pass of the
teacher (to its raw predictions), and a step of the distilled student. Ratios within a run are what to report.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  chooses the Detectron2 that the imports below find
import torch
from d2_distill.data.registration import register_datasets
from d2_distill.distiller import Distiller
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError
from d2_distill.staged import DenseRun
from d2_distill.student import build_student
from d2_distill.teacher import teacher_config
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn


def synthetic_batch(batch_size: int, height: int, width: int, num_classes: int) -> List[Dict[str, Any]]:
    """Noise images with eight boxes each, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(batch_size):
        corners = torch.rand(8, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1) + torch.tensor([0.0, 0.0, 8.0, 8.0]))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def training_step(model: nn.Module, cfg: CfgNode, batch: List[Dict[str, Any]]) -> Callable[[], None]:
    model = model.to(memory_format=torch.channels_last).train()  # as the trainer does
    optimizer = build_optimizer(cfg, model)

    def step() -> None:
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def teacher_forward(distiller: Distiller, batch: List[Dict[str, Any]]) -> Callable[[], None]:
    teacher = distiller.teacher

    def forward() -> None:
        run = teacher.staged.run(teacher.staged.preprocess(batch), frozen=True)
        if isinstance(run, DenseRun):
            run.predictions
        else:
            with torch.no_grad():
                teacher.model(batch)

    return forward


def measure(arms: Dict[str, Callable[[], None]], warmup: int, steps: int) -> Dict[str, List[float]]:
    """Seconds of every step of every arm; the arms take turns."""
    seconds: Dict[str, List[float]] = {name: [] for name in arms}
    for step in range(warmup + steps):
        for name, arm in arms.items():
            _synchronize()
            start = time.perf_counter()
            arm()
            _synchronize()
            if step >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_random_teacher(cfg: CfgNode, folder: str) -> CfgNode:
    """The config with untrained teacher weights: speed does not depend on them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(Path(folder) / "teacher.pth")
    state = build_student(teacher_config(cfg)).state_dict()
    for name, value in state.items():
        if name.endswith("norm.weight"):
            value *= 0.25  # else the activations of an untrained deep network overflow
    torch.save({"model": state}, cfg.MODEL.DISTILL.TEACHER.WEIGHTS)
    cfg.freeze()
    return cfg


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller" or not cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
        raise UserError(f"{args.config_file} distils nothing; name a config with a MODEL.DISTILL.TEACHER.")
    register_datasets(cfg)
    with tempfile.TemporaryDirectory() as folder:
        distiller = Distiller(with_random_teacher(cfg, folder)).to(cfg.MODEL.DEVICE)
    student = build_student(cfg)
    batch = synthetic_batch(args.batch_size, *args.image_size, num_classes=distiller.staged.num_classes)
    arms = {
        "plain student step": training_step(student, cfg, batch),
        "teacher forward": teacher_forward(distiller, batch),
        "distilled step": training_step(distiller, cfg, batch),
    }
    with EventStorage():
        seconds = measure(arms, args.warmup, args.steps)
    rows = [[name, 1e3 * statistics.median(times), 1e3 * min(times)] for name, times in seconds.items()]
    print(tabulate(rows, headers=["", "median ms", "minimum ms"], floatfmt=".1f"))
    plain, teacher, distilled = (torch.tensor(times, dtype=torch.float64) for times in seconds.values())
    # Ratio step by step, since neighbouring steps share the machine's mood.
    print(f"distilled / (plain + teacher): {(distilled / (plain + teacher)).median():.3f}")
    print(f"distilled / plain:             {(distilled / plain).median():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config with a Distiller")
    parser.add_argument("--image-size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    try:
        run(parser.parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

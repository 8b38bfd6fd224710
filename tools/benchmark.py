#!/usr/bin/env python3
"""Measures what distillation costs a training step, how fast checkpoints and students are, and how large a detector is.

    python tools/benchmark.py step --config-file configs/quickstart/distilled.yaml --image-size 256 256
    python tools/benchmark.py inference --config-file configs/quickstart/student.yaml MODEL.WEIGHTS model.pth
    python tools/benchmark.py students --config-file configs/quickstart/student.yaml --beside configs/bccd/student.yaml
    python tools/benchmark.py size --config-file configs/quickstart/student.yaml --image-size 800 1333
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project need not be installed

import d2_distill  # noqa: F401  before detectron2: chooses which one is imported

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from d2_distill.checkpoint.exact import load_exactly
from d2_distill.data.checks import check_dataset
from d2_distill.data.registration import register_datasets
from d2_distill.detectors.building import DISTILLER, build_detector
from d2_distill.distiller import CHECKED_STEPS, Distiller
from d2_distill.engine.optimizer import build_optimizer
from d2_distill.engine.setup import load_config
from d2_distill.engine.trainer import Trainer
from d2_distill.errors import UserError, reported
from d2_distill.evaluation.complexity import count_parameters, flop_counter, flops_by_module
from d2_distill.evaluation.speed import seconds_in_turns, seconds_of, synthetic_batch
from d2_distill.layers.memory_format import in_fast_layout
from d2_distill.staged import stage_detector
from d2_distill.teacher import teacher_config

STEP = """
Four arms run interleaved in one process on one synthetic batch: a step of the plain student, the forward pass
of the teacher (to its raw predictions; if there is one), a step of the distilled student, and the distillation
terms alone: forward and backward of the methods, given all that the student's own losses and the teacher compute.
Ratios within a run are what to report. --baseline adds two arms: a distilled step with other config values, such as
one without imitation, and what the distilled step runs of the teacher; their sum is what it should cost.
"""
INFERENCE = """
Images a second of the plain student with MODEL.WEIGHTS ("" keeps the initial weights), one image a batch:
forward and post-processing, without the loading of data, on the first set of DATASETS.TEST or on a synthetic
image. No teacher is built.
"""
STUDENTS = """
The plain students of several configs in turns, in one process, on the same synthetic images: a training step of a
batch, and the detection in one image. The ratios to the first are what to report. No weights are loaded; config keys
and values hold for all configs.
"""
SIZE = """
Parameters of the plain student and of its parts, and their multiply-adds (each counts as one) when it detects in
a synthetic image. Those of a two-stage detector depend on its proposals. Of a distilled student also what the forward
pass of a training step adds to its own, and the parameters trained beside it. No weights are loaded.
"""
WARMUP_IMAGES = 5  # not counted: allocation and autotuning
Batch = list[dict[str, Any]]


def training_step(model: nn.Module, cfg: CfgNode, batch: Batch) -> Callable[[], None]:
    model = in_fast_layout(model.train())  # as the trainer does
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # an untrained detector would soon diverge, and stop at a loss that is not finite

    storage = EventStorage()  # counts the steps, for what is measured every so many of them

    def step() -> None:
        with storage:
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        storage.iter += 1

    return step


def teacher_forward(distiller: Distiller, batch: Batch) -> Callable[[], None]:
    teacher = distiller.teacher

    def forward() -> None:
        run = teacher.staged.run(teacher.staged.preprocess(batch), frozen=True)
        if teacher.staged.family == "dense":
            run.predictions
        else:
            with torch.no_grad():
                teacher.model(batch)

    return forward


def teacher_part(distiller: Distiller, batch: Batch) -> Callable[[], None]:
    """What a distilled step runs of the teacher without gradient, layer by layer."""
    calls, running = [], []

    def enter(module: nn.Module, args, kwargs) -> None:
        if not running and not torch.is_grad_enabled():
            calls.append((module, args, kwargs))
        running.append(module)

    def leave(module: nn.Module, args, output) -> None:
        running.pop()

    hooks = []
    for module in distiller.teacher.model.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    distiller.train()(batch)
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def part() -> None:
        for module, args, kwargs in calls:
            module(*args, **kwargs)

    return part


def distillation_terms(distiller: Distiller, batch: Batch) -> Callable[[], None]:
    """Forward and backward of the methods, to the stages that the student's own losses have computed."""
    runs = []
    first_method = next(iter(distiller.methods.values()))
    hook = first_method.register_forward_pre_hook(lambda _, args: runs.append((copy.copy(args[0]), args[1])))
    distiller.train()(batch)
    hook.remove()
    [(student, teacher)] = runs
    vars(student).update(leaves(vars(student)))  # the graph below is not needed any more

    def terms() -> None:
        run = copy.copy(student)  # a stage that only the methods read is theirs to compute, in every step
        vars(run).update(leaves(vars(student)))
        distiller.methods.zero_grad()
        weighted = [
            value * method.weights[term]
            for method in distiller.methods.values()
            for term, value in method(run, teacher).items()
        ]
        sum(weighted).backward()

    return terms


def leaves(value: Any) -> Any:
    """The same containers with every tensor that requires gradient cut off from its graph."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    if isinstance(value, dict):
        return {key: leaves(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(leaves(item) for item in value)
    return value


def damp(model: nn.Module) -> nn.Module:
    """Keep the activations of an untrained deep network from overflowing; speed does not depend on it."""
    for name, value in model.state_dict().items():
        if name.endswith("norm.weight"):
            value *= 0.25
    return model


def build_distiller(cfg: CfgNode) -> Distiller:
    """The distiller of a config, with untrained weights in student and teacher."""
    cfg = cfg.clone()
    cfg.defrost()
    with tempfile.TemporaryDirectory() as folder:
        if cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE:
            cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(Path(folder) / "teacher.pth")
            teacher = damp(build_detector(teacher_config(cfg)))
            torch.save({"model": teacher.state_dict()}, cfg.MODEL.DISTILL.TEACHER.WEIGHTS)
        distiller = Distiller(cfg).to(cfg.MODEL.DEVICE).prepare_training()
    damp(distiller.student)
    return distiller


def benchmark_step(cfg: CfgNode, args: argparse.Namespace) -> None:
    if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
        raise UserError(f"{args.config_file} distils nothing; name a config with META_ARCHITECTURE {DISTILLER}.")
    register_datasets(cfg)
    distiller = build_distiller(cfg)
    if not distiller.methods:
        raise UserError(f"{args.config_file} distils nothing; give it MODEL.DISTILL.METHODS with weights.")
    student = damp(build_detector(cfg))
    batch = synthetic_batch(args.batch_size, *args.image_size, num_classes=distiller.staged.num_classes)
    with EventStorage():
        arms = {"plain student step": training_step(student, cfg, batch)}
        if distiller.teacher is not None:
            arms["teacher forward"] = teacher_forward(distiller, batch)
        arms["distilled step"] = training_step(distiller, cfg, batch)
        arms["distillation terms"] = distillation_terms(distiller, batch)
        if args.baseline:
            baseline = cfg.clone()
            baseline.defrost()
            baseline.merge_from_list(args.baseline)
            arms["baseline step"] = training_step(build_distiller(baseline), baseline, batch)
            if distiller.teacher is not None:
                arms["teacher's part"] = teacher_part(distiller, batch)
        seconds = seconds_in_turns(arms, warmup=args.warmup, rounds=args.steps)
    rows = [[name, 1e3 * statistics.median(times), 1e3 * min(times)] for name, times in seconds.items()]
    print(tabulate(rows, headers=["", "median ms", "minimum ms"], floatfmt=".1f"))
    # Ratios step by step, since neighbouring steps share the machine's mood.
    times = {name: torch.tensor(each, dtype=torch.float64) for name, each in seconds.items()}
    plain, distilled = times["plain student step"], times["distilled step"]
    ratios = {"distilled / plain": distilled / plain, "terms / plain": times["distillation terms"] / plain}
    if "teacher forward" in times:
        ratios = {"distilled / (plain + teacher)": distilled / (plain + times["teacher forward"]), **ratios}
    if "baseline step" in times:
        ratios["distilled / baseline"] = distilled / times["baseline step"]
        expected = times["baseline step"] + times.get("teacher's part", 0)
        ratios["distilled / (baseline + teacher's part)"] = distilled / expected
    for name, ratio in ratios.items():
        print(f"{name + ':':30} {ratio.median():.3f}")


def test_images(cfg: CfgNode, args: argparse.Namespace) -> Iterable[Batch]:
    if args.image_size:
        return itertools.repeat(synthetic_batch(1, *args.image_size, num_classes=1))
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name a data set, or take a synthetic image by --image-size.")
    register_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    check_dataset(name, key="DATASETS.TEST", strict=False)
    return Trainer.build_test_loader(cfg, name)


def benchmark_inference(cfg: CfgNode, args: argparse.Namespace) -> None:
    images = test_images(cfg, args)
    model = build_detector(cfg)
    if cfg.MODEL.WEIGHTS:
        load_exactly(model, cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS")
    model = in_fast_layout(model.eval())
    seconds: list[float] = []
    with torch.no_grad():
        for number, batch in enumerate(itertools.islice(images, args.max_images), start=1):
            duration = seconds_of(lambda: model(batch))
            if number > WARMUP_IMAGES:
                seconds.append(duration)
                if number % args.log_interval == 0:
                    print(f"{number} images: {len(seconds) / sum(seconds):.1f} images/s", flush=True)
    if not seconds:
        raise UserError(f"There must be more than {WARMUP_IMAGES} images, for the first are not counted.")
    fps, median = len(seconds) / sum(seconds), statistics.median(seconds)
    device = next(model.parameters()).device
    print(f"Overall: {fps:.1f} images/s, median {1e3 * median:.1f} ms, {len(seconds)} images, {device}")


def benchmark_students(cfg: CfgNode, args: argparse.Namespace) -> None:
    steps, detections, sizes = {}, {}, {}
    for path in (args.config_file, *args.beside):
        own = cfg if path == args.config_file else load_config(path, args.opts)
        student, detector = damp(build_detector(own)), in_fast_layout(build_detector(own).eval())
        batch = synthetic_batch(args.batch_size, *args.image_size, num_classes=stage_detector(student).num_classes)
        with EventStorage():
            steps[path] = training_step(student, own, batch)
        detections[path] = detection(detector, batch[:1])
        sizes[path] = count_parameters(student) / 1e6
    rows = [[path, size] for path, size in sizes.items()]
    for arms in (steps, detections):
        times = seconds_in_turns(arms, warmup=args.warmup, rounds=args.steps)
        first = torch.tensor(times[args.config_file], dtype=torch.float64)
        for row in rows:
            own_times = torch.tensor(times[row[0]], dtype=torch.float64)
            row += [1e3 * own_times.median().item(), (own_times / first).median().item()]
    headers = ["", "parameters (M)", "step, median ms", "to the first", "detection, median ms", "to the first"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".2f", ".1f", ".2f", ".1f", ".2f")))


def detection(detector: nn.Module, batch: Batch) -> Callable[[], None]:
    @torch.no_grad()
    def detect() -> None:
        detector(batch)

    return detect


def report_size(cfg: CfgNode, args: argparse.Namespace) -> None:
    model = build_detector(cfg).eval()
    batch = synthetic_batch(1, *args.image_size, num_classes=1)
    height, width = stage_detector(model).preprocess(batch).tensor.shape[-2:]
    # The detector, its parts, and what the pyramid stands on.
    flops = {
        name: count
        for name, count in flops_by_module(model, batch).items()
        if "." not in name or name.endswith(".bottom_up")
    }
    rows = [
        [name or type(model).__name__, count_parameters(model.get_submodule(name)) / 1e6, flops[name] / 1e9]
        for name in sorted(flops)
    ]
    print("Image of {} x {}, padded to {} x {}".format(*args.image_size, height, width))
    headers = ["", "parameters (M)", "multiply-adds (G)"]
    print(tabulate(rows, headers=headers, floatfmt=".3f"))
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        headers[0] = "training step, forward"
        print(tabulate(training_rows(build_distiller(cfg), args.image_size), headers=headers, floatfmt=".3f"))


def training_rows(distiller: Distiller, image_size: Sequence[int]) -> list[list[Any]]:
    """Name, parameters and multiply-adds of the forward pass of a step: of the student alone, and what comes to it."""
    num_classes = distiller.staged.num_classes
    batch = synthetic_batch(1, *image_size, num_classes=num_classes)
    small = synthetic_batch(1, 128, 128, num_classes=num_classes)
    distiller.train()
    with EventStorage():
        for _ in range(CHECKED_STEPS):  # which cost more
            distiller(small)
        whole, student = (multiply_adds(lambda: model(batch)) for model in (distiller, distiller.student))
        teacher = parameters = 0
        if distiller.teacher is not None:
            staged = distiller.teacher.staged
            teacher = multiply_adds(lambda: staged.run(staged.preprocess(batch), frozen=True).features)
            parameters = count_parameters(distiller.teacher.model)
    rest = "methods: assistants, teacher's head, adapters"
    return [
        ["student", count_parameters(distiller.student) / 1e6, student / 1e9],
        ["teacher's features", parameters / 1e6, teacher / 1e9],
        [rest, count_parameters(distiller.methods) / 1e6, (whole - student - teacher) / 1e9],
    ]


def multiply_adds(forward: Callable[[], Any]) -> int:
    with torch.no_grad(), flop_counter() as counter:
        forward()
    return counter.get_total_flops() // 2


def parse_args() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config-file", required=True, metavar="FILE")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="step|inference|students|size")

    step = commands.add_parser("step", description=STEP, parents=[common], help="cost of training")
    step.set_defaults(command=benchmark_step)
    size = {"type": int, "nargs": 2, "metavar": ("H", "W")}
    step.add_argument("--image-size", **size, default=(256, 256))
    step.add_argument("--batch-size", type=int, default=2)
    step.add_argument("--steps", type=int, default=20, help="timed steps of each arm")
    step.add_argument("--warmup", type=int, default=5)
    step.add_argument("--baseline", nargs="+", default=[], metavar="KEY VALUE", help="config values of the baseline")

    inference = commands.add_parser("inference", description=INFERENCE, parents=[common], help="images/s")
    inference.set_defaults(command=benchmark_inference)
    inference.add_argument("--image-size", **size, help="measure a synthetic image")
    inference.add_argument("--max-images", type=int, default=2000)
    inference.add_argument("--log-interval", type=int, default=50, metavar="IMAGES")

    students = commands.add_parser("students", description=STUDENTS, parents=[common], help="speed of plain students")
    students.set_defaults(command=benchmark_students)
    students.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="configs of other students")
    students.add_argument("--image-size", **size, default=(256, 256))
    students.add_argument("--batch-size", type=int, default=2)
    students.add_argument("--steps", type=int, default=20, help="timed rounds")
    students.add_argument("--warmup", type=int, default=3)

    size_of = commands.add_parser("size", description=SIZE, parents=[common], help="parameters, multiply-adds")
    size_of.set_defaults(command=report_size)
    size_of.add_argument("--image-size", **size, default=(800, 1333))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with reported():
        torch.set_num_threads(args.threads)
        args.command(load_config(args.config_file, args.opts), args)


if __name__ == "__main__":
    main()

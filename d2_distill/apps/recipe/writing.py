"""The three config files of a recipe, with a comment on each choice."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .choices import (
    FEWEST_PASSES,
    MOST_PASSES,
    RATE_BATCH,
    SMALL_PERCENTILE,
    SMALL_SIDE,
    VIEWS_PRETRAINED,
    VIEWS_SCRATCH,
    Size,
    anchors,
)
from .detectors import LEVELS, STAGES, Backbone, head_keys
from .objects import Objects


@dataclass(frozen=True)
class Schedule:
    """Length and rate of a training.

    Attributes:
        images: of the training sets.
        passes: over them.
        reason: where the number of passes is from.
    """

    images: int
    batch: int
    rate: float
    iterations: int
    reason: str

    @property
    def passes(self) -> float:
        return self.iterations * self.batch / self.images


@dataclass(frozen=True)
class Recipe:
    """All choices.

    Attributes:
        data: rows of ``DATASETS.COCO`` and ``VOC``, and names of ``TRAIN`` and ``TEST``.
        classes: names, for the comment; the detector takes them from the data.
        side: longer side of the images, pixels.
        scale: side of an anchor in strides.
    """

    name: str
    data: dict[str, Any]
    classes: Sequence[str]
    head: str
    size: Size
    objects: Objects
    side: int
    scale: int
    student: Backbone
    teacher: Backbone
    schedules: dict[str, Schedule]
    workers: int

    @property
    def shorter_side(self) -> int:
        return round(self.side * self.objects.aspect)

    def size_report(self) -> str:
        """Return what image side and anchors mean for the objects, in a sentence."""
        parts = ", ".join(f"{value:.0f} px ({p} %)" for p, value in self.objects.percentiles(self.side).items())
        reached = 100 * self.objects.reached(self.side, anchors(self.scale))
        return (
            f"objects measure {parts} in images of {self.side} px; anchors of {anchors(self.scale)} px reach {reached:.1f} % "
            "of them"
        )

    def config(self, role: str, folder: str) -> str:
        """Return the text of ``student.yaml``, ``teacher.yaml`` or ``distilled.yaml``.

        Args:
            role: "student", "teacher" or "distilled".
            folder: where the configs will be.
        """
        return self._distilled(folder) if role == "distilled" else self._plain(role)

    def _plain(self, role: str) -> str:
        backbone, schedule = (self.student if role == "student" else self.teacher), self.schedules[role]
        classes = ", ".join(self.classes[:20]) + (", ..." if len(self.classes) > 20 else "")
        lines = [
            f"# The {role}: {self.head} on {backbone.name}, from {'ImageNet weights' if backbone.weights else 'scratch'}.",
            "VERSION: 2",
            "DATASETS:",
            f"  # {len(self.classes)} classes, which the head takes from the annotations: {classes}",
            *(f"  {key}: {_flow(value)}" for key, value in self.data.items() if value),
            "INPUT:",
            '  FORMAT: "RGB"',
            f"  # {SMALL_PERCENTILE} % of the objects are smaller than {SMALL_SIDE} px, or the images or --size allow no more:",
            *(f"  # {line}" for line in textwrap.wrap(f"{self.size_report()}.", 116)),
            f"  MIN_SIZE_TRAIN: ({self.shorter_side},)",
            f"  MAX_SIZE_TRAIN: {self.side}",
            "  # Test as you train: at another size a detector this small finds little.",
            f"  MIN_SIZE_TEST: {self.shorter_side}",
            f"  MAX_SIZE_TEST: {self.side}",
            "DATALOADER:",
            f"  NUM_WORKERS: {self.workers}  # of the cores of the machine that wrote this, but one",
            "MODEL:",
            f'  META_ARCHITECTURE: "{self.head}"',
            f'  WEIGHTS: "{backbone.weights}"',
            "  # ImageNet's, for RGB.",
            "  PIXEL_MEAN: [123.675, 116.28, 103.53]",
            "  PIXEL_STD: [58.395, 57.12, 57.375]",
            "  BACKBONE:",
            f'    NAME: "{backbone.builder}"',
            "    FREEZE_AT: 0",
            "  RESNETS:",
            *(f"    {key}: {_flow(value)}" for key, value in {**backbone.resnets, "OUT_FEATURES": STAGES}.items()),
            "  FPN:",
            f"    IN_FEATURES: {_flow(STAGES)}",
            "    # The same for student and teacher, so that their maps compare as they are.",
            f"    OUT_CHANNELS: {self.size.channels}",
            f'    TOP_BLOCK: ""  # the objects need no level above {LEVELS[-1]}',
        ]
        for node, keys in head_keys(self.head, self.scale, self.size.convs).items():
            lines += [f"  {node}:", *(f"    {key}: {_flow(value)}" for key, value in keys.items())]
        lines += [
            "SOLVER:",
            '  OPTIMIZER: "AdamW"',
            f"  # {'0.001 from pretrained weights, 0.002 from scratch'}, times the root of batch / {RATE_BATCH}.",
            f"  BASE_LR: {schedule.rate}",
            "  WEIGHT_DECAY: 0.05",
            f"  IMS_PER_BATCH: {schedule.batch}",
            f"  # {schedule.passes:.3g} passes over {schedule.images} images: {schedule.reason}.",
            f"  MAX_ITER: {schedule.iterations}",
            '  LR_SCHEDULER_NAME: "WarmupCosineLR"',
            f"  WARMUP_ITERS: {max(schedule.iterations // 20, 1)}",
            f"  CHECKPOINT_PERIOD: {max(schedule.iterations // 10, 1)}",
            "  CHECKPOINTS_KEPT: 2",
            "TEST:",
            f"  EVAL_PERIOD: {max(schedule.iterations // 10, 1) if self.data['TEST'] else 0}",
            f'OUTPUT_DIR: "output/{self.name}/{role}"',
        ]
        return "\n".join(lines) + "\n"

    def _distilled(self, folder: str) -> str:
        return "\n".join([
            "# The student, taught by the teacher; train that first.",
            '_BASE_: "student.yaml"',
            "MODEL:",
            '  META_ARCHITECTURE: "Distiller"',
            "  DISTILL:",
            f'    STUDENT: "{self.head}"',
            "    # Chosen for the pair, with weights that follow the gradients; the log says which.",
            '    METHODS: ["auto"]',
            "    TEACHER:",
            f'      CONFIG_FILE: "{folder}/teacher.yaml"',
            f'      WEIGHTS: "output/{self.name}/teacher/model_final.pth"',
            f'OUTPUT_DIR: "output/{self.name}/distilled"',
        ]) + "\n"


def schedule_reason(pretrained: bool, budget: str | None) -> str:
    """Return where a number of passes is from."""
    views = VIEWS_PRETRAINED if pretrained else VIEWS_SCRATCH
    rule = f"about {views} images seen {'from ImageNet weights' if pretrained else 'from scratch'}"
    return f"what fits into {budget}" if budget else f"{rule}, but {FEWEST_PASSES} to {MOST_PASSES} passes"


def _flow(value: Any) -> str:
    """Return a value in YAML's flow style, which is that of JSON."""
    return json.dumps(value)

"""From data sets to a recipe, and from a recipe to files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch
import yaml
from detectron2.config import CfgNode

from ...config.keys import get_distill_cfg
from ...data.classes import with_classes
from ...data.own_sets import name_data
from ...data.registration import register_datasets
from ...errors import UserError
from ...whole_files import require_free, whole_file
from ..data_check.inspection import Inspection, inspect_annotations
from . import choices
from .detectors import PAIRS
from .objects import Objects
from .timing import Seconds
from .writing import Recipe, Schedule, schedule_reason

ROLES = ("teacher", "student", "distilled")


def inspect(train_data: Sequence[Sequence[str]], test_data: Sequence[Sequence[str]]) -> tuple[CfgNode, list[Inspection]]:
    """Return a config with the data sets, and what is in those to train on.

    Raises:
        UserError: a set is missing or has errors, or none has an object.
    """
    cfg = get_distill_cfg()
    name_data(cfg, train_data, test_data)
    inspections = inspect_annotations(cfg)
    errors = [problem for each in inspections for problem in each.problems if problem.kind.is_error]
    if errors:
        raise UserError(
            f"The data has {len(errors)} errors, such as: {errors[0].sentence.rstrip('.')}; see all of them by "
            "tools/check_data.py with the same --train-data and --test-data."
        )
    train = [each for each in inspections if each.name in cfg.DATASETS.TRAIN]
    if not any(each.annotations for each in train):
        raise UserError("--train-data has no object, so there is nothing to learn; name annotated images.")
    return cfg, train


def make_recipe(
    cfg: CfgNode,
    train: Sequence[Inspection],
    *,
    name: str,
    head: str,
    size: str,
    pretrained: bool,
    budget: float | None = None,
    budget_text: str | None = None,
    measure: Callable[[CfgNode], Seconds] | None = None,
) -> Recipe:
    """Choose everything.

    Args:
        train: the data sets to train on.
        name: of the output folder.
        budget: seconds for one training; None trains as long as the rule says.
        budget_text: how the user wrote it.
        measure: measures the steps of a config, see :func:`.timing.measure`; needed with a budget.

    Raises:
        UserError: the budget cannot be met.
    """
    records = [record for each in train for record in each.records if record["annotations"]]
    objects, limits = Objects.from_records(records), choices.SIZES[size]
    side = choices.image_side(objects, limits.longest_side)
    images, batch = len(records), choices.batch_size(limits, len(records))
    student, teacher = PAIRS[size, pretrained]
    wanted = choices.iterations(images, batch, choices.passes(images, pretrained))
    schedule = Schedule(
        images, batch, choices.learning_rate(batch, pretrained), wanted, schedule_reason(pretrained, None)
    )
    names = [name for each in train for name in each.class_names]
    recipe = Recipe(
        name, _data_keys(cfg), list(dict.fromkeys(names)), head, limits, objects, side,
        choices.anchor_scale(objects, side), student, teacher, {"student": schedule, "teacher": schedule},
        choices.workers(os.cpu_count() or 1),
    )
    if budget is not None:
        cost = {role: measure(parsed(recipe.config(role, ""))) for role in ("student", "teacher")}
        # The distilled student trains as long as the plain one, and runs its teacher in each step.
        longest = {"student": cost["student"].step + cost["teacher"].forward, "teacher": cost["teacher"].step}
        for role, seconds in longest.items():
            fitting = choices.iterations_in(budget, seconds, images, batch, wanted)
            if fitting < wanted:
                recipe.schedules[role] = Schedule(
                    images, batch, schedule.rate, fitting, schedule_reason(pretrained, budget_text)
                )
    return recipe


def parsed(text: str) -> CfgNode:
    """Return a config file's config, without its weights, whose data sets are registered."""
    cfg = get_distill_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
    cfg.MODEL.WEIGHTS = ""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg, names=(*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    return with_classes(cfg)


def write(recipe: Recipe, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write the three files; return their paths.

    Raises:
        UserError: one of them exists, and they are not to be overwritten; none is then written.
    """
    paths = [folder / f"{role}.yaml" for role in ROLES]
    for path in paths:
        require_free(path, overwrite=overwrite, option="--output")
    for role, path in zip(ROLES, paths):
        with whole_file(path) as partial:
            partial.write_text(recipe.config(role, os.path.relpath(folder).replace(os.sep, "/")), encoding="utf-8")
    return paths


def _data_keys(cfg: CfgNode) -> dict[str, Any]:
    return {key: _lists(cfg.DATASETS[key]) for key in ("COCO", "VOC", "TRAIN", "TEST")}


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value

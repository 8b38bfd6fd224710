"""Values that the table of rules forbids, given to the programs: each is refused in a sentence, and nothing is written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from d2_distill.config import rules
from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.keys_page import page

from ..data.small_sets import write_coco
from ..small_detectors import build, detector_cfg
from .command_line import ROOT, call

ALL = os.environ.get("D2_DISTILL_ROBUSTNESS") == "all"
DEFAULTS = get_distill_cfg()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    row = write_coco(folder / "data")
    cfg = detector_cfg("RetinaNet", RETINANET__NUM_CLASSES=2)
    cfg.DATASETS.COCO, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (row,), (row[0],), (row[0],)
    cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = "output", 1
    (folder / "run.yaml").write_text(cfg.dump())
    torch.save({"model": build(cfg).state_dict()}, folder / "teacher.pth")
    return folder


def bad_values(rule: rules.Rule) -> list[Any]:
    """Values of the default's type that the rule forbids, and some of other types."""
    default = rules.value_of(DEFAULTS, rule.key)
    found: list[Any] = ["None"]
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        numbers = [-2, -1, 0, 1.5, 2, 1e9, math.nan, math.inf]
        found += [type(default)(value) for value in numbers if isinstance(default, float) or math.isfinite(value)]
        found += ["'text'", [1, 2]]
    elif isinstance(default, str):
        found += ["''", "'horizontl'", "'nothing of the kind'", 3, [1]]
    else:
        found += [[], [-1], [0], [3, 2], [2, 2], ["a"], [None], "'text'", 3]
    return found


def _is_forbidden(rule: rules.Rule, value: Any) -> bool:
    if isinstance(value, str) or value != value or value in (math.inf,):
        return value != "''" or bool(rule.choices) or rule.key == "OUTPUT_DIR"
    cfg = get_distill_cfg()
    try:
        cfg.merge_from_list([rule.key, value])
    except (ValueError, TypeError):
        return True
    try:
        return rule.fault(cfg) is not None
    except TypeError:  # an element of another type
        return True


# Key and value of the command line; rules that share a key have one list.
CASES = sorted({
    (rule.key, repr(value) if not isinstance(value, str) else value)
    for rule in rules.RULES
    if rules.value_of(DEFAULTS, rule.key) is not rules.ABSENT
    for value in bad_values(rule)
    if _is_forbidden(rule, value) and all(_is_forbidden(other, value) for other in rules.RULES if other.key == rule.key)
})


def test_there_are_many_cases():
    assert len(CASES) >= 400


@pytest.mark.parametrize("part", range(8))
def test_forbidden_values(place, part):
    files = sorted(place.rglob("*"))
    for key, value in CASES[part :: 8 if ALL else 64]:
        ended = call("train_net.py", "--config-file", "run.yaml", key, value, folder=place)
        said = f"{key} {value}: {ended.output}"
        assert ended.status == 1 and not ended.has_traceback and len(ended.errors) == 1, said
        assert key in ended.errors[0] or key.rpartition(".")[2] in ended.errors[0], said
        assert sorted(place.rglob("*")) == files, said


@pytest.mark.parametrize("program", [
    ("tools/predict.py", "--input", "data/images"), ("tools/benchmark.py", "step"), ("tools/show_regions.py", "--output", "seen"),
    ("tools/check_teacher.py",), ("tools/export.py", "torchscript", "--output", "a.pt"), ("train_net.py", "--eval-only"),
    ("train_net.py", "--list"),
])
def test_other_programs(place, program):
    ended = call(*program, "--config-file", "run.yaml", "MODEL.PIXEL_STD", "[0, 1, 1]", "SOLVER.MAX_ITER", "0", folder=place)
    assert ended.status == 1 and not ended.has_traceback, ended.output
    assert "MODEL.PIXEL_STD is [0, 1, 1]" in ended.errors[0] and "SOLVER.MAX_ITER is 0; it must be at least 1" in ended.errors[0]


def test_near_names_are_suggested(place):
    ended = call("train_net.py", "--config-file", "run.yaml", "INPUT.RANDOM_FLIP", "horizontl", folder=place)
    assert "did you mean 'horizontal'?" in ended.errors[0]


@pytest.mark.parametrize("overrides, named", [
    (("MODEL.META_ARCHITECTURE", "Distiller"), "MODEL.DISTILL.METHODS is empty"),
    (("MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILL.METHODS", "('PKD',)", "MODEL.DISTILL.TEACHER.CONFIG_FILE", "run.yaml",
      "MODEL.DISTILL.PKD.WEIGHT", "-1.0"), "MODEL.DISTILL.PKD.WEIGHT is -1.0"),
    (("MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILL.METHODS", "('PKD',)", "MODEL.DISTILL.TEACHER.CONFIG_FILE", "run.yaml",
      "MODEL.DISTILL.TEACHER.OPTS", "['MODEL.PIXEL_STD', [0.0, 1.0, 1.0]]"), "MODEL.DISTILL.TEACHER: run.yaml"),
])
def test_distillations_of_nothing(place, overrides, named):
    files = sorted(place.rglob("*"))
    words = () if "TEACHER" not in str(overrides) else ("MODEL.DISTILL.TEACHER.WEIGHTS", "teacher.pth")
    ended = call("train_net.py", "--config-file", "run.yaml", *overrides, *words, folder=place)
    assert ended.status == 1 and not ended.has_traceback and named in ended.errors[0], ended.output
    assert sorted(place.rglob("*")) == files


def test_the_page_is_that_of_the_table():
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == page()

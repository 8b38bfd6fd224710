"""Where the keys come from: all files of the package add theirs, whatever is imported."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
from detectron2.config import CfgNode, get_cfg

from d2_distill.config import keys
from d2_distill.config.keys import add_distill_config, extend_config, get_distill_cfg
from d2_distill.methods import DISTILL_METHOD_REGISTRY

from ..end_to_end.runs import run_program

OURS = [name for name, method in DISTILL_METHOD_REGISTRY if method.__module__.startswith("d2_distill.")]


@pytest.mark.parametrize("module", ["d2_distill.config.keys", "d2_distill.methods.pearson"])
def test_whatever_is_imported_first_all_keys_are_there(module):
    program = (
        f"import {module}; from d2_distill.config.keys import get_distill_cfg; "
        "model = get_distill_cfg().MODEL; print(sorted(model.DISTILL), sorted(model))"
    )
    outcome = run_program("-c", program).succeeded()
    model = get_distill_cfg().MODEL
    assert outcome.stdout.splitlines()[-1] == f"{sorted(model.DISTILL)} {sorted(model)}"
    assert {"FCOS", "ATSS", "GFL", "MSAD", "MOBILENETV2", "SLIMMABLE", "LOW_RESOLUTION", "SWIN"} <= set(model)


@pytest.mark.parametrize("name", OURS)
def test_a_method_has_its_keys_in_its_own_file_each_with_a_comment(name):
    method = DISTILL_METHOD_REGISTRY.get(name)
    cfg = CfgNode({"MODEL": {"DISTILL": {}}})
    sys.modules[method.__module__].add_config(cfg)
    [node] = cfg.MODEL.DISTILL
    assert method.KEY == f"MODEL.DISTILL.{node}" and cfg.MODEL.DISTILL[node] == get_distill_cfg().MODEL.DISTILL[node]
    lines = inspect.getsource(sys.modules[method.__module__].add_config).splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r" +node\.[\w.]+ = (?!CfgNode)", line)]
    assert keys and all(lines[index - 1].lstrip().startswith("# ") for index in keys)


def test_an_extension_adds_its_keys_to_every_new_config(monkeypatch):
    monkeypatch.setattr(keys, "_EXTENSIONS", list(keys._EXTENSIONS))

    @extend_config
    def add_config(cfg):
        cfg.MODEL.DISTILL.MINE = CfgNode({"WEIGHT": 1.0, "LEVELS": []})

    first, second = get_distill_cfg(), get_cfg()
    add_distill_config(second)
    first.MODEL.DISTILL.MINE.LEVELS.append("p3")
    assert second.MODEL.DISTILL.MINE == {"WEIGHT": 1.0, "LEVELS": []}
    first.merge_from_list(["MODEL.DISTILL.MINE.WEIGHT", 2.0])
    assert second.MODEL.DISTILL.MINE.WEIGHT == 1.0

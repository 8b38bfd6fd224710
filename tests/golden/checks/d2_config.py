"""Recorded behaviour of the configuration: defaults, coercion on merging, config files."""

from __future__ import annotations

import logging
import re

import pytest
import yaml
from detectron2.config import get_cfg

from ..cases import Case, suite_root
from ..recording import plain
from .d2_left_out import is_left_out

_ERRORS = {"AssertionError": AssertionError, "KeyError": KeyError, "ValueError": ValueError}


def _lookup(cfg, dotted: str):
    for key in dotted.split("."):
        cfg = cfg[key]
    return cfg


def _as_lists(value):
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def check_defaults(case: Case) -> None:
    cfg = get_cfg()
    recorded = suite_root("detectron2") / "default_config.yaml"
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(recorded.read_text())
    assert {key: [type(_lookup(cfg, key)).__name__] for key in _leaves(cfg)} == case.data


def check_merge(case: Case) -> None:
    for entry in case.data["merge_from_list"]:
        cfg, opts, description = get_cfg(), plain(entry["opts"]), entry["desc"]
        if "raises" in entry:
            with pytest.raises(_ERRORS[entry["raises"]]):
                cfg.merge_from_list(opts)
            continue
        cfg.merge_from_list(opts)
        value = _lookup(cfg, opts[0])
        assert _as_lists(value) == entry["value"], description
        assert type(value).__name__ == entry["type"], description


# Recorded name of a value -> its key.
_KEYS = {
    "MASK_ON": "MODEL.MASK_ON",
    "DEPTH": "MODEL.RESNETS.DEPTH",
    "STEPS": "SOLVER.STEPS",
    "VERSION": "VERSION",
    "RPN_BETA": "MODEL.RPN.SMOOTH_L1_BETA",
}


def check_files(case: Case) -> None:
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    for stem, text in case.data["files"].items():
        (case.scratch / f"{stem}.yaml").write_text(text)
    for stem in case.data["results"]:
        cfg, path = get_cfg(), str(case.scratch / f"{stem}.yaml")
        version = re.search(r"VERSION: (\d+)", case.data["files"].get(stem, ""))
        if version and version[1] == "1" and is_left_out(case, "configs of version 1", "results", stem):
            with pytest.raises(NotImplementedError, match="VERSION 1"):
                cfg.merge_from_file(path)
            continue
        expected = case.data["results"][stem]
        if "raises" in expected:
            with pytest.raises(_ERRORS[expected["raises"]]):
                cfg.merge_from_file(path)
            continue
        cfg.merge_from_file(path)
        for name, value in expected.items():
            assert _as_lists(_lookup(cfg, _KEYS[name])) == value, (stem, name)


CHECKS = {
    "config_default_types": check_defaults,
    "config_merge_cases": check_merge,
    "config_file_cases": check_files,
}

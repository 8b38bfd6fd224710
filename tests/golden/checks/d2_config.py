"""Recorded behaviour of the configuration: defaults, coercion on merging, config files."""

from __future__ import annotations

import logging

import pytest
import yaml
from detectron2.config import get_cfg

from d2_distill import provider

from ..cases import suite_root

LEFT_OUT = {
    "config_file_cases: v1": "the embedded Detectron2 refuses VERSION 1 in place of upgrading it",
}

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


def check_defaults(data, arrays, name, tmp_path):
    cfg = get_cfg()
    recorded = suite_root("detectron2") / "default_config.yaml"
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(recorded.read_text())
    assert {key: [type(_lookup(cfg, key)).__name__] for key in _leaves(cfg)} == data


def check_merge(data, arrays, name, tmp_path):
    for case in data["merge_from_list"]:
        cfg = get_cfg()
        if "raises" in case:
            with pytest.raises(_ERRORS[case["raises"]]):
                cfg.merge_from_list(case["opts"])
            continue
        cfg.merge_from_list(case["opts"])
        value = _lookup(cfg, case["opts"][0])
        assert _as_lists(value) == case["value"], case["desc"]
        assert type(value).__name__ == case["type"], case["desc"]


def check_files(data, arrays, name, tmp_path):
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    for stem, text in data["files"].items():
        (tmp_path / f"{stem}.yaml").write_text(text)
    for stem, expected in data["results"].items():
        cfg, path = get_cfg(), str(tmp_path / f"{stem}.yaml")
        if stem == "v1" and provider.name() == "embedded":
            with pytest.raises(NotImplementedError, match="VERSION 1"):
                cfg.merge_from_file(path)
            continue
        if "raises" in expected:
            with pytest.raises(_ERRORS[expected["raises"]]):
                cfg.merge_from_file(path)
            continue
        cfg.merge_from_file(path)
        assert {
            "MASK_ON": cfg.MODEL.MASK_ON,
            "DEPTH": cfg.MODEL.RESNETS.DEPTH,
            "STEPS": list(cfg.SOLVER.STEPS),
            "VERSION": cfg.VERSION,
            "RPN_BETA": cfg.MODEL.RPN.SMOOTH_L1_BETA,
        } == expected, stem


CHECKS = {
    "config_default_types": check_defaults,
    "config_merge_cases": check_merge,
    "config_file_cases": check_files,
}

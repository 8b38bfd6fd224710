from __future__ import annotations

import pytest
import yaml
from detectron2.config import CfgNode, configurable, get_cfg


class Head:
    @configurable
    def __init__(self, *, channels, bias=False):
        self.channels, self.bias = channels, bias

    @classmethod
    def from_config(cls, cfg, scale=1):
        return {"channels": cfg.CHANNELS * scale}


class WideHead(Head):
    @classmethod
    def from_config(cls, cfg, scale=1):
        return {"channels": 100 * super().from_config(cfg, scale)["channels"]}


@pytest.fixture
def cfg():
    return CfgNode({"CHANNELS": 8})


def test_configurable_class(cfg):
    assert Head(channels=3).channels == 3
    assert Head(cfg).channels == Head(cfg=cfg).channels == 8
    head = Head(cfg, scale=2, bias=True)
    assert (head.channels, head.bias) == (16, True)
    assert Head(cfg, channels=5).channels == 5
    assert WideHead(cfg, 2).channels == 1600


def test_configurable_passes_everything_to_an_open_from_config(cfg):
    class Open:
        @configurable
        def __init__(self, *, given):
            self.given = given

        @classmethod
        def from_config(cls, cfg, **kwargs):
            return {"given": kwargs}

    assert Open(cfg, a=1, b=2).given == {"a": 1, "b": 2}


def test_configurable_misuse(cfg):
    class NoFromConfig:
        @configurable
        def __init__(self, *, channels):
            pass

    class NotClassMethod(NoFromConfig):
        def from_config(cfg):
            return {}

    class WrongName(NoFromConfig):
        @classmethod
        def from_config(cls, config):
            return {}

    with pytest.raises(AttributeError, match="from_config"):
        NoFromConfig(cfg)
    for wrong in (NotClassMethod, WrongName):
        with pytest.raises(TypeError, match="from_config"):
            wrong(cfg)


def test_defaults_are_copied_and_can_be_frozen():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES.append("res5")
    assert get_cfg().MODEL.RESNETS.OUT_FEATURES == ["res4"]
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SOLVER.BASE_LR = 0.1


def test_base_chain_and_python_expressions(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "base.yaml").write_text(
        "MODEL:\n  ANCHOR_GENERATOR:\n"
        "    SIZES: !!python/object/apply:eval ['[[x, x * 2] for x in [8, 16]]']\n"
        "SEED: 1\nVERSION: 2\n")
    (tmp_path / "middle.yaml").write_text("_BASE_: base.yaml\nSEED: 2\nVERSION: 2\n")
    (tmp_path / "folder" / "last.yaml").write_text("_BASE_: ../middle.yaml\nOUTPUT_DIR: x\nVERSION: 2\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "folder" / "last.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8, 16], [16, 32]]
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (2, "x")


def test_dump_can_be_merged_again(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "(3, 5)", "DATASETS.TRAIN", "('a',)"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump()) and again.SOLVER.STEPS == (3, 5)

"""Data sets named by their paths alone."""

from __future__ import annotations

import argparse
import logging
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_distill.data.own_sets import add_data_arguments, name_data
from d2_distill.data.registration import register_datasets
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError

from .small_sets import CLASSES, small_cfg, write_coco, write_voc


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a data set folder elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path


def test_arguments():
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args("--train-data a.json i --train-data b.json i --test-data voc val SEED 1".split())
    assert args.train_data == [["a.json", "i"], ["b.json", "i"]] and args.test_data == [["voc", "val"]]
    assert args.opts == ["SEED", "1"] and parser.parse_args([]).train_data == []


def test_paths_are_below_the_working_directory_or_the_data_sets_folder(folder):
    name = folder.name
    write_coco(folder / "work" / name / "annotations", name="train")
    write_coco(folder / "datasets" / name / "annotations", name="val")
    write_voc(folder / "datasets" / f"{name}_voc")
    cfg = small_cfg(DATASETS__TEST=("coco_2017_val",))
    train = (f"{name}/annotations/train.json", f"{name}/annotations/images")
    val = (f"{name}/annotations/val.json", f"{name}/annotations/images")
    name_data(cfg, [train, train], [val, (f"{name}_voc/", "train")])
    assert cfg.DATASETS.TRAIN == (f"{name}_train",) * 2
    assert cfg.DATASETS.TEST == (f"{name}_val", f"{name}_voc_train")
    here = folder / "work"
    # The images are looked for by themselves.
    assert cfg.DATASETS.COCO == (
        (f"{name}_train", str(here / train[0]), str(here / train[1])),
        (f"{name}_val", val[0], str(here / val[1])),
    )
    assert cfg.DATASETS.VOC == ((f"{name}_voc_train", f"{name}_voc/", "train", (), 2012),)
    register_datasets(cfg)
    assert MetadataCatalog.get(f"{name}_voc_train").thing_classes == list(CLASSES)
    assert len(DatasetCatalog.get(f"{name}_train")) == 3


def test_what_is_not_named_stays(folder, caplog):
    row = write_coco(folder / "work" / "a")
    rows = (("old", "old.json", "old"), ("older", "older.json", "old"))
    cfg = small_cfg(DATASETS__COCO=rows, DATASETS__TRAIN=("old",), DATASETS__TEST=("older",))
    name_data(cfg, [], [])
    assert cfg.DATASETS.COCO == rows and cfg.DATASETS.TEST == ("older",)
    name_data(cfg, [], [row[1:]])
    assert cfg.DATASETS.TRAIN == ("old",) and cfg.DATASETS.TEST == ("a_set",)
    assert [row[0] for row in cfg.DATASETS.COCO] == ["old", "a_set"]
    with caplog.at_level(logging.INFO, logger="d2_distill.data.own_sets"):
        name_data(cfg, [row[1:]], [])
    assert cfg.DATASETS.TRAIN == ("a_set",) and cfg.DATASETS.TEST == () and "nothing is evaluated" in caplog.text
    assert [row[0] for row in cfg.DATASETS.COCO] == ["a_set"], "what the config was written for need not be here"
    register_datasets(cfg)


def test_names_differ(folder):
    rows = [write_coco(folder / "work" / top / "a") for top in "xy"]
    cfg = small_cfg()
    name_data(cfg, [row[1:] for row in rows], [])
    assert cfg.DATASETS.TRAIN == ("a_set", "a_set_2")
    shutil.move("x", "a b")
    cfg = small_cfg()
    name_data(cfg, [("a b/a/set.json", "a b/a/images")], [])
    name_data(cfg, [], [("a b/a/set.json", "a b/a/images")])
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ("a_set",) and len(cfg.DATASETS.COCO) == 1


@pytest.mark.parametrize("words, sentence", [
    (("no.json", "a/images"), "--train-data: there is no no.json in the working directory or below .*COCO .* VOC"),
    (("a/set.json", "no"), "--train-data: there is no folder no .*image folder of a/set.json"),
    (("a/set.json", "a/set.json"), "there is no folder a/set.json"),
    (("a/images", "a/set.json"), "a/images is a folder; name the annotation file a/set.json first"),
])
def test_paths_that_do_not_exist(folder, words, sentence):
    write_coco(folder / "work" / "a")
    with pytest.raises(UserError, match=sentence):
        name_data(small_cfg(), [words], [])


@pytest.mark.parametrize("kind", ["COCO", "VOC"])
def test_pure_overrides_do_the_same(folder, kind):
    """The rows as text, as on a command line."""
    name = folder.name
    if kind == "COCO":
        write_coco(folder / "datasets" / "a", classes=("cat", "cow", "dog"))
        row = f"('{name}','a/set.json','a/images')"
    else:
        write_voc(folder / "datasets" / "a", objects=([("cat", 3, 4, 10, 9), ("cow", 3, 4, 9, 9), ("dog", 3, 4, 9, 9)],))
        row = f"('{name}','a','train',(),2012)"
    sets = [f"DATASETS.{kind}", f"({row},)", "DATASETS.TRAIN", f"('{name}',)", "MODEL.DEVICE", "cpu"]
    cfg = load_config("", [*sets, "MODEL.META_ARCHITECTURE", "RetinaNet"])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.DATASETS.CLASSES == ("cat", "cow", "dog")
    assert name in DatasetCatalog.list()

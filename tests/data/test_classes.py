"""A detector has the classes of its data, as the config then says."""

from __future__ import annotations

import logging

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_distill.data.classes import check_outputs, dataset_classes, with_classes
from d2_distill.data.registration import register_datasets
from d2_distill.detectors.building import num_classes_key
from d2_distill.detectors.stock import StagedRetinaNet
from d2_distill.errors import UserError

from ..small_detectors import CASES, build, detector_cfg, distiller_cfg
from .small_sets import CLASSES, write_coco, write_voc

FOUR = ("ant", "bee", "cow", "dog")


def number(cfg) -> int:
    return eval(f"cfg.{num_classes_key(cfg)}", {"cfg": cfg})


def on_data(cfg, *coco, voc=(), train=None, test=()):
    rows = (*coco, *voc)
    train = tuple(row[0] for row in rows) if train is None else train
    values = {"COCO": coco, "VOC": voc, "TRAIN": train, "TEST": test}
    cfg.merge_from_list([item for key, value in values.items() for item in (f"DATASETS.{key}", value)])
    return cfg


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distilled", [False, True])
def test_every_head_is_sized(case, distilled, tmp_path, caplog):
    row = write_coco(tmp_path, classes=FOUR)
    cfg = on_data(distiller_cfg(case, None) if distilled else detector_cfg(case), row)
    cfg.freeze()
    with caplog.at_level(logging.INFO, logger="d2_distill.data.classes"):
        sized = with_classes(cfg)
    assert number(sized) == 4 and sized.DATASETS.CLASSES == FOUR and sized.is_frozen()
    assert number(cfg) == 3 and cfg.DATASETS.CLASSES == ()
    for part in (f"{num_classes_key(cfg)} is 4 (it was 3)", f"'{row[0]}' (DATASETS.TRAIN)", ": ant, bee, cow, dog."):
        assert part in caplog.text
    assert with_classes(sized) is sized and dataset_classes(sized) == list(FOUR)


def test_config_that_was_sized_needs_no_data(tmp_path):
    row = write_coco(tmp_path)
    stored = yaml.safe_load(with_classes(on_data(detector_cfg("GFL"), row)).dump())
    assert stored["DATASETS"]["CLASSES"] == list(CLASSES) and stored["MODEL"]["GFL"]["NUM_CLASSES"] == 2
    (tmp_path / "set.json").unlink()
    cfg = detector_cfg("GFL", DISTILL__STUDENT="GFL")
    cfg.merge_from_list(["DATASETS.COCO", stored["DATASETS"]["COCO"], "DATASETS.CLASSES", ("a", "b", "c", "d", "e")])
    assert number(with_classes(cfg)) == 5


def test_first_set_that_tells_its_classes(tmp_path):
    mine, other = (
        write_coco(tmp_path / folder, name=tmp_path.name, classes=classes) for folder, classes in (("a", FOUR), ("b", CLASSES))
    )
    lost = (f"{tmp_path.name}_lost", str(tmp_path / "no.json"), mine[2])
    cfg = on_data(detector_cfg("FCOS"), other, mine, train=("unknown", mine[0]), test=(other[0],))
    assert with_classes(cfg).DATASETS.CLASSES == FOUR
    assert other[0] not in DatasetCatalog.list(), "only what is asked is read"
    cfg = on_data(detector_cfg("FCOS"), lost, other, train=("unknown", lost[0]), test=(other[0],))
    assert with_classes(cfg).DATASETS.CLASSES == CLASSES
    cfg = on_data(detector_cfg("FCOS"), train=("coco_2017_train",), test=(other[0],))
    assert number(with_classes(cfg)) == 80


def test_unknown_classes_leave_the_config_as_it_is(tmp_path, caplog):
    lost = (f"{tmp_path.name}_lost", str(tmp_path / "no.json"), str(tmp_path))
    cfg = on_data(detector_cfg("FCOS"), lost)
    with caplog.at_level(logging.WARNING, logger="d2_distill.data.classes"):
        assert with_classes(cfg) is cfg
    assert f"'{lost[0]}' are not known: DATASETS.COCO" in caplog.text and "no.json cannot be read" in caplog.text
    assert with_classes(detector_cfg("FCOS")).MODEL.FCOS.NUM_CLASSES == 3 and dataset_classes(cfg) == []


def test_set_registered_from_python(tmp_path):
    name = f"{tmp_path.name}_python"
    DatasetCatalog.register(name, lambda: [])
    cfg = on_data(detector_cfg("ATSS"), train=(name,))
    assert with_classes(cfg) is cfg
    MetadataCatalog.get(name).thing_classes = list(FOUR)
    assert number(with_classes(cfg)) == 4 and dataset_classes(cfg) == list(FOUR)


def test_voc_set_follows_the_order_of_coco(tmp_path):
    """A Pascal VOC set whose row names no classes has those of the detector."""
    coco = write_coco(tmp_path, classes=("dog", "cat"))
    voc = (*write_voc(tmp_path)[:3], (), 2012)
    cfg = with_classes(on_data(detector_cfg("FCOS"), coco, voc=(voc,), train=(coco[0],), test=(voc[0],)))
    register_datasets(cfg)
    assert MetadataCatalog.get(voc[0]).thing_classes == ["dog", "cat"] == dataset_classes(cfg)


@pytest.mark.parametrize("names, sentence", [
    (("cat", 1), "has 1; write the name"),
    (("cat", ""), "has ''; write the name"),
    (("cat", "dog", "cat"), "has 'cat' twice"),
])
def test_malformed_names(names, sentence):
    cfg = detector_cfg("FCOS")
    cfg.DATASETS.CLASSES = names
    with pytest.raises(UserError, match=f"DATASETS.CLASSES {sentence}"):
        with_classes(cfg)


def declare_key(monkeypatch, key: str) -> None:
    """Let RetinaNet's adapter declare another key of the number of classes."""
    monkeypatch.setattr(StagedRetinaNet, "num_classes_key", classmethod(lambda cls, model_class, cfg: key))


def test_a_key_that_the_config_has_not(monkeypatch, tmp_path):
    declare_key(monkeypatch, "MODEL.MINE.CLASSES")
    cfg = on_data(detector_cfg("RetinaNet"), write_coco(tmp_path))
    with pytest.raises(UserError, match="StagedRetinaNet.num_classes_key is 'MODEL.MINE.CLASSES', which is no key"):
        with_classes(cfg)


def test_a_key_that_the_model_does_not_read(monkeypatch, tmp_path):
    key = "MODEL.FCOS.NUM_CLASSES"
    declare_key(monkeypatch, key)
    cfg = with_classes(on_data(detector_cfg("RetinaNet"), write_coco(tmp_path, classes=FOUR)))
    expected = rf"RetinaNet predicts 3 classes, .* has 4 \(ant, bee, cow, dog\); let it read {key}"
    with pytest.raises(UserError, match=expected):
        check_outputs(cfg, build(cfg))


@pytest.mark.parametrize("case", CASES)
def test_every_detector_predicts_the_classes_of_its_config(case, tmp_path):
    cfg = detector_cfg(case)
    check_outputs(cfg, build(cfg))  # whose classes have no names
    cfg = with_classes(on_data(cfg, write_coco(tmp_path, classes=FOUR)))
    check_outputs(cfg, build(cfg))

"""A data set is read once; what was read is what everyone gets."""

from __future__ import annotations

import gc

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_distill.data.loaded import all_to_hand_over, handed_over, keep_only, load_once, without_collection
from d2_distill.data.registration import register_datasets

from .small_sets import CLASSES, small_cfg, write_coco, write_voc


@pytest.fixture
def python_set(tmp_path):
    """The name of a data set that the user's own code has registered, and what is appended to at each read."""
    name, reads = f"{tmp_path.name}_python", []

    def load():
        reads.append(name)
        MetadataCatalog.get(name).thing_classes = list(CLASSES)
        return [{"file_name": f"{len(reads)}.png", "annotations": []}]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).mine = object()
    yield name, reads
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_python_code_loads_once(python_set):
    name, reads = python_set
    entry = load_once(name)
    assert load_once(name) is entry and not reads
    first, second = entry(), DatasetCatalog.get(name)
    first[0]["file_name"] = "changed"
    assert second == DatasetCatalog.get(name) == entry.records().unpacked() and second[0]["file_name"] == "1.png"
    assert len(reads) == 1 and entry.metadata == {"thing_classes": list(CLASSES)}


def test_only_what_is_kept_is_not_read_again(python_set):
    name, reads = python_set
    load_once(name).records()
    keep_only([name])
    load_once(name).records()
    assert len(reads) == 1
    keep_only([])
    assert all_to_hand_over()[name].records is None
    assert DatasetCatalog.get(name)[0]["file_name"] == "2.png"


def test_what_is_handed_over_is_not_read(python_set):
    name, reads = python_set
    load_once(name).records()
    given = all_to_hand_over()[name]
    other = f"{name}_elsewhere"  # stands for the same data set in another process
    DatasetCatalog.register(other, lambda: 1 / 0)
    with handed_over({other: given, "never asked for": given}):
        assert load_once(other).handed_over
    assert DatasetCatalog.get(other) == DatasetCatalog.get(name) and len(reads) == 1
    assert MetadataCatalog.get(other).thing_classes == list(CLASSES)
    DatasetCatalog.register("never asked for", list)
    assert not load_once("never asked for").handed_over
    for each in (other, "never asked for"):
        DatasetCatalog.remove(each)
        MetadataCatalog.remove(each)


def test_rows_of_a_config_are_handed_over_by_name(tmp_path):
    """Nothing of the files is read, which are gone."""
    coco, voc = write_coco(tmp_path / "coco", name=tmp_path.name), write_voc(tmp_path / "voc")
    voc = (f"{tmp_path.name}_voc", *voc[1:3], (), 2012)
    cfg = small_cfg(DATASETS__COCO=(coco,), DATASETS__VOC=(voc,), DATASETS__TRAIN=(coco[0],))
    register_datasets(cfg)
    load_once(voc[0]).records()
    expected = {name: (DatasetCatalog.get(name), vars(MetadataCatalog.get(name))) for name in (coco[0], voc[0])}
    given = all_to_hand_over()
    for name in expected:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    (tmp_path / "coco" / f"{tmp_path.name}.json").unlink()
    (tmp_path / "voc" / "Annotations" / "0.xml").unlink()
    with handed_over(given):
        register_datasets(cfg)
    for name, (records, metadata) in expected.items():
        assert DatasetCatalog.get(name) == records and vars(MetadataCatalog.get(name)) == metadata


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was(enabled):
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), without_collection():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()

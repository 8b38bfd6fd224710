"""Data sets that the config names are registered, or refused with a sentence."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from .small_sets import CLASSES, small_cfg, write_coco, write_voc


def test_coco_row_is_registered_once_with_the_classes_of_its_file(tmp_path):
    row = write_coco(tmp_path)
    cfg = small_cfg(DATASETS__COCO=(row,))
    register_datasets(cfg)
    register_datasets(cfg)
    metadata = MetadataCatalog.get(row[0])
    assert metadata.thing_classes == list(CLASSES) and metadata.evaluator_type == "coco"
    records = DatasetCatalog.get(row[0])
    assert [record["height"] for record in records] == [20, 30, 20]
    assert [record["annotations"][0]["category_id"] for record in records] == [0, 1, 0]
    register_datasets(cfg)  # loading has added to the metadata


def test_voc_row_is_registered_once(tmp_path):
    row = write_voc(tmp_path)
    cfg = small_cfg(DATASETS__VOC=(row,))
    register_datasets(cfg)
    register_datasets(cfg)
    metadata = MetadataCatalog.get(row[0])
    assert metadata.thing_classes == list(CLASSES) and metadata.evaluator_type == "pascal_voc"
    assert metadata.year == 2012
    assert DatasetCatalog.get(row[0])[1]["annotations"][0]["bbox"] == [2.0, 3.0, 10.0, 9.0]


def test_relative_paths_are_below_the_datasets_folder(tmp_path, monkeypatch):
    name, _, _ = write_coco(tmp_path / "mine", name=tmp_path.name)
    voc = write_voc(tmp_path / "voc")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(small_cfg(
        DATASETS__COCO=((name, f"mine/{tmp_path.name}.json", "mine/images"),),
        DATASETS__VOC=((name + "_voc", "voc", *voc[2:]),),
    ))
    assert DatasetCatalog.get(name)[0]["file_name"] == str(tmp_path / "mine" / "images" / "0.png")
    assert DatasetCatalog.get(name + "_voc")[0]["file_name"] == str(tmp_path / "voc" / "JPEGImages" / "0.jpg")


@pytest.mark.parametrize("key, row", [
    ("DATASETS.COCO", "name"),
    ("DATASETS.COCO", ("name", "file.json")),
    ("DATASETS.COCO", ("name", "file.json", 3)),
    ("DATASETS.VOC", ("name", "folder", "train", "cat", 2012)),
    ("DATASETS.COCO", ()),
    ("DATASETS.VOC", ("name", "folder", "train", ("cat", 1), 2012)),
    ("DATASETS.VOC", ("name", "folder", "train", ("cat",), "2012")),
])
def test_malformed_row(key, row):
    with pytest.raises(UserError, match=rf"{key} has the row .*write it as \(name, "):
        register_datasets(small_cfg(**{key.replace(".", "__"): (row,)}))


def test_missing_files(tmp_path):
    name, json_file, image_root = write_coco(tmp_path)
    with pytest.raises(UserError, match=f"DATASETS.COCO .*{tmp_path}/no.json cannot be read .*DATASETS"):
        register_datasets(small_cfg(DATASETS__COCO=((name, str(tmp_path / "no.json"), image_root),)))
    with pytest.raises(UserError, match=f"DATASETS.COCO .*image folder {tmp_path}/no is missing"):
        register_datasets(small_cfg(DATASETS__COCO=((name, json_file, str(tmp_path / "no")),)))
    voc = write_voc(tmp_path)
    with pytest.raises(UserError, match=f"DATASETS.VOC .*folder {tmp_path}/no is missing"):
        register_datasets(small_cfg(DATASETS__VOC=((voc[0], str(tmp_path / "no"), *voc[2:]),)))
    with pytest.raises(UserError, match="DATASETS.VOC .*split file .*val.txt is missing"):
        register_datasets(small_cfg(DATASETS__VOC=((voc[0], voc[1], "val", *voc[3:]),)))
    assert name not in DatasetCatalog.list() and voc[0] not in DatasetCatalog.list()


@pytest.mark.parametrize("text, sentence", [
    ("{", "is not valid JSON"),
    ("\x00\x80", "is not valid JSON"),
    ("[]", "is not a COCO annotation file"),
    ('{"images": [], "annotations": []}', "is not a COCO annotation file"),
])
def test_not_coco(tmp_path, text, sentence):
    name, json_file, image_root = write_coco(tmp_path)
    (tmp_path / "set.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"DATASETS.COCO .*{json_file} {sentence}.*; "):
        register_datasets(small_cfg(DATASETS__COCO=((name, json_file, image_root),)))


@pytest.mark.parametrize("section, field, value, sentence", [
    ("images", "height", None, "entry 1 of 'images' lacks 'height'"),
    ("annotations", "bbox", None, "entry 1 of 'annotations' lacks 'bbox'"),
    ("annotations", "bbox", [1, 2, 3], "annotation 2 has the bbox"),
    ("annotations", "id", 1, "two entries of 'annotations' have the id 1"),
    ("annotations", "id", [], r"entry 1 of 'annotations' has the id \[\], which is not a number"),
    ("annotations", "bbox", [1, 2, 3, "4"], "annotation 2 has the bbox .* which is not .x, y, width, height."),
    ("annotations", "category_id", [], "annotation 2 has the category_id"),
    ("annotations", "image_id", None, "lacks 'image_id'"),
    ("images", "file_name", 7, "image 101 has the file_name 7, which is not a text"),
    ("images", "width", "30", "image 101 has the width '30', which is not a number of pixels"),
    ("images", "height", 0, "image 101 has the height 0"),
    ("categories", "id", "20", "entry 1 of 'categories' has the id '20'"),
    ("categories", "name", 5, "category 20 has the name 5, which is not a text"),
    ("annotations", "category_id", 5, "annotation 2 has category_id 5"),
    ("annotations", "image_id", 5, "annotation 2 has image_id 5"),
    ("annotations", "ignore", 1, "annotation 2 has 'ignore' set"),
    ("categories", "name", "cat", "'categories' has the name 'cat' twice"),
])
def test_inconsistent_coco(tmp_path, section, field, value, sentence):
    def edit(content):
        if value is None:
            del content[section][1][field]
        else:
            content[section][1][field] = value

    row = write_coco(tmp_path, edit=edit)
    with pytest.raises(UserError, match=f"{row[1]}.*{sentence}.*; "):
        register_datasets(small_cfg(DATASETS__COCO=(row,)))


def test_name_of_another_data_set(tmp_path):
    row = write_coco(tmp_path)
    register_datasets(small_cfg(DATASETS__COCO=(row,)))
    other = write_coco(tmp_path, name="other")
    with pytest.raises(UserError, match=f"'{row[0]}', which is registered already .*choose another name"):
        register_datasets(small_cfg(DATASETS__COCO=((row[0], *other[1:]),)))
    with pytest.raises(UserError, match="DATASETS.COCO names .*'coco_2017_val', which is registered already"):
        register_datasets(small_cfg(DATASETS__COCO=(("coco_2017_val", *row[1:]),)))


def test_voc_year_and_classes(tmp_path):
    row = write_voc(tmp_path)
    with pytest.raises(UserError, match="year 2010; write 2007 .* or 2012"):
        register_datasets(small_cfg(DATASETS__VOC=((*row[:4], 2010),)))
    with pytest.raises(UserError, match="names a class twice"):
        register_datasets(small_cfg(DATASETS__VOC=((*row[:3], ("cat", "cat"), 2012),)))


def test_voc_classes_are_those_of_the_folder(tmp_path):
    """Of all its splits; files that are not XML do not matter here."""
    train = write_voc(tmp_path, objects=([("dog", 3, 4, 10, 9)], [("cow", 3, 4, 10, 9)], []))
    test = write_voc(tmp_path, objects=([("dog", 3, 4, 10, 9)],), split="test")
    (tmp_path / "Annotations" / "9.xml").write_text("<annotation>")
    rows = [(f"{tmp_path.name}_{row[2]}", *row[1:3], (), 2012) for row in (train, test)]
    cfg = small_cfg(DATASETS__VOC=rows)
    register_datasets(cfg, names=[rows[0][0]])
    assert rows[1][0] not in DatasetCatalog.list()
    register_datasets(cfg)
    register_datasets(cfg)
    assert [MetadataCatalog.get(row[0]).thing_classes for row in rows] == [["cow", "dog"], ["cow", "dog"]]
    given = (f"{tmp_path.name}_given", *rows[0][1:])
    register_datasets(small_cfg(DATASETS__VOC=(given,), DATASETS__CLASSES=("dog", "cow")))
    assert MetadataCatalog.get(given[0]).thing_classes == ["dog", "cow"]
    assert [row["annotations"][0]["category_id"] for row in DatasetCatalog.get(given[0])[:2]] == [0, 1]


def test_voc_folder_without_classes(tmp_path):
    row = write_voc(tmp_path, objects=([], []))
    with pytest.raises(UserError, match="Annotations has an object, .*name them in the row"):
        register_datasets(small_cfg(DATASETS__VOC=((*row[:3], (), 2012),)))
    with pytest.raises(UserError, match=f"folder {tmp_path}/no/Annotations is missing"):
        register_datasets(small_cfg(DATASETS__VOC=((row[0], str(tmp_path / "no"), "train", (), 2012),)))

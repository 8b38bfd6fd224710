"""What is wrong with a data set is said before training, in a sentence."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2_distill.data.checks import check_dataset, check_datasets
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from .small_sets import CLASSES, small_cfg, write_coco, write_image, write_voc

KEY = "DATASETS.TRAIN"


def registered(*coco, voc=(), train=None, test=()):
    cfg = small_cfg(DATASETS__COCO=coco, DATASETS__VOC=voc, DATASETS__TEST=test)
    cfg.DATASETS.TRAIN = tuple(row[0] for row in (*coco, *voc)) if train is None else train
    register_datasets(cfg)
    return cfg


def test_good_sets_pass(tmp_path):
    coco, voc = write_coco(tmp_path / "coco", name=tmp_path.name), write_voc(tmp_path)
    cfg = registered(coco, voc=(voc,), test=(voc[0],))
    check_datasets(cfg)
    assert check_dataset(voc[0], key=KEY) == list(CLASSES)


def test_unknown_name(tmp_path):
    row = write_coco(tmp_path)
    cfg = registered(row, train=(row[0] + "s",))
    with pytest.raises(UserError, match=f"DATASETS.TRAIN names .*not registered; did you mean {row[0]}"):
        check_datasets(cfg)
    cfg = registered(row, test=("?",))
    with pytest.raises(UserError, match=r"DATASETS.TEST names .*'\?', .*add it to DATASETS.COCO or"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        check_datasets(cfg)


def test_evaluation_leaves_training_data_aside(tmp_path):
    row = write_coco(tmp_path)
    check_datasets(registered(row, train=("?",), test=(row[0],)), train=False)


def clear(content):
    content["images"], content["annotations"] = [], []


def all_crowd(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def set_box(*box):
    def edit(content):
        content["annotations"][1]["bbox"] = list(box)

    return edit


@pytest.mark.parametrize("edit, sentence", [
    (clear, "is empty; correct"),
    (all_crowd, r"has 3 images, but none with a usable \(non-crowd\) box"),
    (set_box(2, 3, 0, 6), r"images/1.png, annotation 2: the box \[2, 3, 0, 6\] has no area; "),
    (set_box(2, 3, 8, -6), r"images/1.png, annotation 2: the box \[2, 3, 8, -6\] has no area; "),
    (set_box(float("nan"), 3, 8, 6), r"images/1.png, annotation 2: the box \[nan, 3, 8, 6\] is not finite; "),
    (set_box(2, float("inf"), 8, 6), r"images/1.png, annotation 2: the box \[2, inf, 8, 6\] is not finite; "),
    (set_box(21, 3, 8, 6), r"images/1.png, annotation 2: .* lies outside the image of 20 x 30; "),
    (set_box(2, -7, 8, 6), r"images/1.png, annotation 2: .* lies outside the image of 20 x 30; "),
])
def test_unusable_annotations(tmp_path, edit, sentence):
    row = write_coco(tmp_path, edit=edit)
    cfg = registered(row)
    with pytest.raises(UserError, match=f"DATASETS.TRAIN: data set '{row[0]}'.*{sentence}"):
        check_datasets(cfg)


def test_box_that_sticks_out_is_accepted(tmp_path):
    row = write_coco(tmp_path, edit=set_box(15, 3, 8, 6))
    check_datasets(registered(row))


def test_test_set_without_boxes_is_accepted(tmp_path):
    row = write_coco(tmp_path, edit=all_crowd)
    check_datasets(registered(row, train=(), test=(row[0],)), train=False)


def test_published_set_with_an_empty_box_is_only_logged(tmp_path, caplog):
    row = write_coco(tmp_path, edit=set_box(2, 3, 0, 6))
    cfg = registered(row)
    cfg.DATASETS.COCO = ()  # as if Detectron2 had registered it
    with caplog.at_level(logging.WARNING, logger="d2_distill.data.checks"):
        check_datasets(cfg)
    assert "1 boxes have no area" in caplog.text


def test_missing_image_files(tmp_path):
    row = write_coco(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=f"the image file {row[2]}/1.png is missing .1 of 3 are missing.; "):
        check_datasets(registered(row))


def test_annotation_file_that_changes_after_it_was_read(tmp_path):
    """What was read is checked and trained on."""
    row = write_coco(tmp_path)
    cfg = registered(row)
    write_coco(tmp_path, edit=set_box(2, 3, 0, 6))
    check_datasets(cfg)
    (tmp_path / "set.json").unlink()
    check_datasets(cfg)
    assert [len(record["annotations"]) for record in DatasetCatalog.get(row[0])] == [1, 1, 1]


def test_built_in_set_that_is_not_there():
    if DatasetCatalog.list() and MetadataCatalog.get("coco_2017_val").json_file.startswith("datasets"):
        with pytest.raises(UserError, match="DATASETS.TEST: .*instances_val2017.json cannot be read"):
            check_dataset("coco_2017_val", key="DATASETS.TEST")


@pytest.mark.parametrize("classes, sentence", [
    (("cat", "cow"), "they differ in cow, dog"),
    (("dog", "cat"), "the same in another order"),
])
def test_class_lists_that_differ(tmp_path, classes, sentence):
    train = write_coco(tmp_path / "train", name=tmp_path.name)
    test = write_coco(tmp_path / "test", name=tmp_path.name, classes=classes)
    cfg = registered(train, test, train=(train[0],), test=(test[0],))
    with pytest.raises(UserError, match=rf"DATASETS.TEST: .*class list than '{train[0]}' \({sentence}\)"):
        check_datasets(cfg)


@pytest.mark.parametrize("classes, sentence", [
    (("cat", "cow"), "they differ in cow, dog"),
    (("dog", "cat"), "the same in another order"),
])
@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_class_list_of_another_detector(tmp_path, key, classes, sentence):
    row = write_coco(tmp_path)
    cfg = registered(row, train=(), test=())
    cfg.merge_from_list([key, (row[0],), "DATASETS.CLASSES", classes])
    with pytest.raises(UserError, match=rf"{key}: data set '{row[0]}' .*DATASETS.CLASSES.* \({sentence}\); give both"):
        check_datasets(cfg, train=key == "DATASETS.TRAIN")
    cfg.DATASETS.CLASSES = CLASSES
    check_datasets(cfg, train=key == "DATASETS.TRAIN")


def test_category_outside_the_class_list_and_malformed_records(tmp_path):
    write_image(tmp_path / "a.png", 30, 20, seed=0)
    box = {"bbox": [2, 3, 8, 9], "bbox_mode": BoxMode.XYXY_ABS}
    record = {"file_name": str(tmp_path / "a.png"), "height": 20, "width": 30, "image_id": 1}
    good, outside = ({**box, "category_id": category} for category in (1, 2))
    short = {"bbox": [1], "category_id": 1}
    for number, (annotations, sentence) in enumerate((
        ([outside], "category 2 is outside the class list of 2"),
        ([good, short], r"annotation 1: the box is \[1\]"),
        (None, "record 0 .*a.png.* lacks 'annotations'"),
    )):
        name = f"{tmp_path.name}_{number}"
        records = [record if annotations is None else {**record, "annotations": annotations}]
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).set(thing_classes=list(CLASSES))
        with pytest.raises(UserError, match=sentence):
            check_dataset(name, key=KEY)


@pytest.mark.parametrize("text, sentence", [
    (None, r"0.xml cannot be read .*remove its name from the split"),
    ("<annotation>", "0.xml is not valid XML"),
    ("<annotation/>", "0.xml has None as <size/width>"),
    ("<annotation><size><width>30</width><height>20</height></size><object><name>cow</name><bndbox>"
     "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>",
     r"0.xml: object 0 has the class 'cow', which is not in the class list \(cat, dog\)"),
])
def test_voc_annotation_files(tmp_path, text, sentence):
    row = write_voc(tmp_path)
    path = tmp_path / "Annotations" / "0.xml"
    path.write_text(text) if text else path.unlink()
    with pytest.raises(UserError, match=f"DATASETS.TRAIN: data set '{row[0]}'.*{sentence}"):
        check_datasets(registered(voc=(row,)))


def test_empty_voc_split_and_missing_folder(tmp_path):
    row = write_voc(tmp_path, objects=())
    with pytest.raises(UserError, match="is empty; correct"):
        check_datasets(registered(voc=(row,)))
    cfg = registered(voc=((f"{row[0]}_again", *row[1:]),))
    shutil.rmtree(tmp_path / "ImageSets")
    with pytest.raises(UserError, match="split file .*train.txt is missing"):
        check_datasets(cfg)


def test_coco_file_is_left_as_it_was(tmp_path):
    row = write_coco(tmp_path)
    before = json.loads((tmp_path / "set.json").read_text())
    check_datasets(registered(row))
    assert json.loads((tmp_path / "set.json").read_text()) == before

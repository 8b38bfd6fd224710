"""Every problem of a data set is found, and a good one has none."""

from __future__ import annotations

import json
import shutil
import threading
import warnings

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_distill.apps.data_check.inspection import inspect_annotations, inspect_images, samples
from d2_distill.apps.data_check.statistics import class_table, set_table
from d2_distill.data import problems
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from ..data.small_sets import small_cfg, write_coco, write_image, write_voc

WIDE = (60, 40)


def inspected(*coco, voc=(), train=None, test=(), decode=True, **keys):
    cfg = small_cfg(DATASETS__COCO=coco, DATASETS__VOC=voc, DATASETS__TEST=test, **keys)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (80, 120), 1000
    cfg.DATASETS.TRAIN = tuple(row[0] for row in (*coco, *voc)) if train is None else train
    found = inspect_annotations(cfg)
    inspect_images(found, decode=decode, step=lambda: None)
    return found


def kinds(inspection):
    return {problem.kind for problem in inspection.problems}


def sentences(inspection, kind):
    return [problem.sentence for problem in inspection.problems if problem.kind is kind]


def test_good_sets_have_no_problem(tmp_path):
    coco = write_coco(tmp_path, sizes=(WIDE,) * 3)
    voc = write_voc(tmp_path / f"{tmp_path.name}_voc", objects=([("cat", 3, 4, 10, 9)], [("dog", 1, 1, 30, 20)]))
    voc = (*voc[:3], (), 2012)
    for decode in (True, False):
        found = inspected(coco, voc=(voc,), train=(coco[0],), test=(voc[0],), decode=decode)
        assert [(each.name, each.keys, each.problems) for each in found] == [
            (coco[0], ["DATASETS.TRAIN"], []), (voc[0], ["DATASETS.TEST"], [])
        ]
    assert "|        3 |                0 |       3 |" in set_table(found)
    assert [line.split()[1::2] for line in class_table(found).splitlines()[2:]] == [["cat", "2", "1"], ["dog", "1", "1"]]
    assert [record["image_id"] for record, _ in samples(found[0], 2)] == [100, 101]
    assert all(image.shape == (40, 60, 3) for _, image in samples(found[0], 5))


def test_everything_in_a_coco_file_is_told(tmp_path):
    def edit(content):
        images, annotations = content["images"], content["annotations"]
        images[5]["height"] = "40"
        images += [dict(images[0]), dict(images[1], id=300), {"id": 301}]
        boxes = {1: [2, 3, 0, 6], 2: [2, float("nan"), 8, 6], 3: [70, 3, 8, 6], 6: [50, 3, 20, 6], 7: [2, 3, 2, 2]}
        for index, box in boxes.items():
            annotations[index - (index > 4)]["bbox"] = box
        annotations += [
            dict(annotations[0], id=20), dict(annotations[0], id=21, category_id=5), dict(annotations[0], id=22, bbox=[1]),
            dict(annotations[0], id=23, image_id=999), dict(annotations[0], id=24, image_id=105), dict(annotations[0]),
            dict(annotations[0], id=25, ignore=1), dict(annotations[0], id=26, iscrowd=1, bbox=[2, 3, 0, 0]), {"id": 27}, 5,
        ]
        content["categories"] += [{"id": 30, "name": "Cat "}, {"id": 40, "name": "cow"}]

    row = write_coco(tmp_path, sizes=(WIDE,) * 9, edit=edit)
    (tmp_path / "images" / "8.png").rename(tmp_path / "images" / "8.jpg")
    [found] = inspected(row)
    expected = {
        problems.MALFORMED_ENTRY: [
            "image 105 has the height '40'", "entry 11 of 'images' lacks 'file_name'", "annotation 22 has the bbox",
            "entry 16 of 'annotations' lacks 'image_id'", "entry 17 of 'annotations' lacks 'id'",
        ],
        problems.REPEATED_ID: ["'images' have the id 100", "'annotations' have the id 1"],
        problems.UNKNOWN_CATEGORY: ["annotation 21 has category_id 5"],
        problems.UNKNOWN_IMAGE: ["annotation 23 has image_id 999"],
        problems.IGNORED: ["annotation 25 has 'ignore'"],
        problems.MISSING_IMAGE: ["8.png is missing (1 of 9 are missing), but there is"],
        problems.NOT_FINITE: ["2.png, annotation 3: the box [2, nan, 8, 6]"],
        problems.NO_AREA: ["1.png, annotation 2: the box [2, 3, 0, 6]"],
        problems.OUTSIDE: ["3.png, annotation 4: the box [70, 3, 8, 6]"],
        problems.STICKS_OUT: ["6.png, annotation 7: the box [50, 3, 20, 6]"],
        problems.TINY: ["7.png, annotation 8: the longer side of the box [2, 3, 2, 2] is 4.0 pixels"],
        problems.LABELLED_TWICE: ["0.png, annotation 1 is also annotation 20"],
        problems.NO_OBJECTS: ["4.png"],
        problems.REPEATED_FILE: ["1.png is listed 2 times"],
        problems.UNUSED_CLASS: ["'Cat '", "'cow'"],
        problems.SIMILAR_NAMES: ["'cat' and 'Cat '"],
    }
    assert kinds(found) == set(expected)
    for kind, parts in expected.items():
        told = sentences(found, kind)
        assert len(told) == len(parts), told
        for part, sentence in zip(parts, told):
            assert part in sentence


def test_unusable_images(tmp_path):
    row = write_coco(tmp_path, sizes=(WIDE,) * 4)
    folder = tmp_path / "images"
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:1000])
    write_image(folder / "1.png", 40, 60, seed=1)
    (folder / "2.png").write_bytes(b"no image")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(folder / "3.png")
    [found] = inspected(row)
    cut, turned, none = sentences(found, problems.BAD_IMAGE)
    assert "0.png cannot be read" in cut and "2.png cannot be read" in none
    assert turned.endswith("1.png has 40 x 60 pixels, its annotation says 60 x 40")
    assert sentences(found, problems.DEEP_COLOUR) == [f"the image {folder}/3.png has more than 8 bits"]
    [found] = inspected(row, decode=False)
    assert sentences(found, problems.BAD_IMAGE)[0] == turned and len(sentences(found, problems.BAD_IMAGE)) == 2


@pytest.mark.parametrize("decode", [True, False])
def test_warnings_of_images_are_silent_and_their_filters_stay(tmp_path, monkeypatch, decode):
    """Filters belong to the process: only the thread that calls may set and restore them."""
    row = write_coco(tmp_path, sizes=(WIDE,) * 8)
    (tmp_path / "images" / "5.png").write_bytes(b"no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)  # Pillow warns of every image
    entered, enter = [], warnings.catch_warnings.__enter__

    def recorded(self):
        entered.append(threading.current_thread())
        return enter(self)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        monkeypatch.setattr(warnings.catch_warnings, "__enter__", recorded)
        [found] = inspected(row, decode=decode)
        monkeypatch.undo()
        assert warnings.filters == filters
    assert set(entered) == {threading.current_thread()} and not shown
    [fault] = sentences(found, problems.BAD_IMAGE)
    assert "5.png cannot be read" in fault


def test_images_turned_by_their_metadata(tmp_path):
    row = write_coco(tmp_path, sizes=(WIDE,))
    path = tmp_path / "images" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    for decode in (True, False):
        assert not sentences(inspected(row, decode=decode)[0], problems.BAD_IMAGE)


def test_equal_images(tmp_path):
    train = write_coco(tmp_path / "train", sizes=(WIDE,) * 4, name=tmp_path.name)
    test = write_coco(tmp_path / "test", sizes=(WIDE,) * 4, name=tmp_path.name)
    images, others = tmp_path / "train" / "images", tmp_path / "test" / "images"
    for index in range(4):
        write_image(others / f"{index}.png", *WIDE, seed=20 + index)
    shutil.copy(images / "0.png", images / "1.png")
    Image.open(images / "2.png").save(images / "3.png", compress_level=1)
    shutil.copy(images / "0.png", others / "0.png")
    Image.open(images / "2.png").save(others / "1.png", compress_level=1, optimize=False, pnginfo=None, dpi=(9, 9))
    mine, other = inspected(train, test, train=(train[0],), test=(test[0],))
    assert sentences(mine, problems.SAME_IMAGE) == [f"{images}/1.png and {images}/0.png"]
    assert sentences(mine, problems.SAME_LOOK) == [f"{images}/3.png and {images}/2.png"]
    shared = f"{others}/0.png and, in the training data, {images}/0.png"
    assert sentences(other, problems.SHARED_IMAGE) == [shared]
    assert sentences(other, problems.SHARED_LOOK) == [f"{others}/1.png and, in the training data, {images}/2.png"]
    mine, other = inspected(train, test, train=(train[0],), test=(test[0],), decode=False)
    assert sentences(other, problems.SHARED_IMAGE) == [shared] and problems.SAME_LOOK not in kinds(mine)
    same = (f"{tmp_path.name}_again", *train[1:])
    _, again = inspected(train, same, train=(train[0],), test=(same[0],))
    assert [path[-5:] for path in sentences(again, problems.SHARED_IMAGE)] == ["0.png", "1.png", "2.png", "3.png"]


def test_class_lists(tmp_path):
    train = write_coco(tmp_path / "train", sizes=(WIDE,) * 2, name=tmp_path.name)
    test = write_coco(tmp_path / "test", sizes=(WIDE,) * 2, name=tmp_path.name, classes=("cat", "cow"))
    mine, other = inspected(train, test, train=(train[0],), test=(test[0],))
    assert problems.OTHER_CLASSES not in kinds(mine)
    assert "(they differ in cow, dog)" in sentences(other, problems.OTHER_CLASSES)[0]
    assert sentences(other, problems.NOT_TRAINED) == [f"{test[0]} has 1 boxes of 'cow', the training data none"]
    [found] = inspected(train, DATASETS__CLASSES=("dog", "cat"))
    assert "DATASETS.CLASSES" in sentences(found, problems.OTHER_CLASSES)[0]


@pytest.mark.parametrize("text, kind", [
    (None, problems.MISSING_FILE), ("{", problems.NOT_JSON), ("[]", problems.NOT_COCO),
    ('{"images": [], "annotations": [], "categories": []}', problems.EMPTY),
])
def test_useless_coco_file_does_not_hide_the_next_set(tmp_path, text, kind):
    rows = [write_coco(tmp_path / folder, name=tmp_path.name, sizes=(WIDE,)) for folder in ("a", "b")]
    path = tmp_path / "a" / f"{tmp_path.name}.json"
    path.write_text(text) if text else path.unlink()
    first, second = inspected(*rows)
    assert kinds(first) == {kind} and kinds(second) == {problems.UNUSED_CLASS}


def test_no_box_to_learn_from(tmp_path):
    def edit(content):
        content["annotations"] = []

    row = write_coco(tmp_path, sizes=(WIDE,), edit=edit)
    assert problems.NOTHING_TO_LEARN in kinds(inspected(row)[0])
    assert problems.NOTHING_TO_LEARN not in kinds(inspected(row, train=(), test=(row[0],))[0])


def test_what_evaluation_needs(tmp_path):
    def edit(content):
        del content["annotations"][0]["area"]
        del content["annotations"][1]["iscrowd"]

    row = write_coco(tmp_path, sizes=(WIDE,) * 3, edit=edit)
    [trained], [tested] = inspected(row), inspected(row, train=(), test=(row[0],))
    assert trained.problems == []
    first, second = sentences(tested, problems.NOT_EVALUABLE)
    assert "annotation 1 has no number as 'area'" in first and "annotation 2 has no number as 'iscrowd'" in second
    with pytest.raises(UserError, match="DATASETS.COCO .* annotation 1 has no number as 'area', .*; add it: width times"):
        register_datasets(small_cfg(DATASETS__COCO=(row,), DATASETS__TEST=(row[0],)))
    register_datasets(small_cfg(DATASETS__COCO=(row,)))


def test_everything_in_a_voc_folder_is_told(tmp_path):
    good = [("cat", 3, 4, 10, 9)]
    row = write_voc(tmp_path, objects=(good, good, good, [("cow", 1, 1, 9, 9), ("dog", 1, "x", 9, 9)], good))
    for name, text in ((1, "<annotation>"), (2, "<annotation><size><width>0</width><height>2</height></size></annotation>")):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    split = tmp_path / "ImageSets" / "Main" / "train.txt"
    split.write_text(split.read_text() + "\n9\n0 1\n")
    (tmp_path / "JPEGImages" / "4.jpg").rename(tmp_path / "JPEGImages" / "4.png")
    [found] = inspected(voc=(row,))
    expected = {
        problems.MALFORMED_SPLIT: "has the line '0 1'",
        problems.NOT_XML: "1.xml is not valid XML",
        problems.MISSING_XML: "9.xml cannot be read",
        problems.UNKNOWN_CLASS: "3.xml: object 0 has the class 'cow'",
        problems.MISSING_IMAGE: "4.jpg is missing (1 of 4 are missing), but there is",
        problems.REPEATED_FILE: "0.jpg is listed 2 times",
        problems.NO_OBJECTS: "3.jpg",
        problems.UNUSED_CLASS: "'dog'",
    }
    for kind, part in expected.items():
        [sentence] = sentences(found, kind)
        assert part in sentence
    size, corner = sentences(found, problems.MALFORMED_ENTRY)
    assert "2.xml has the size 0 x 2" in size and "object 1 has 'x' as <bndbox/ymin>" in corner
    assert kinds(found) == {*expected, problems.MALFORMED_ENTRY}


def test_missing_voc_folder_and_split(tmp_path):
    row = write_voc(tmp_path)
    gone = (f"{row[0]}_gone", str(tmp_path / "gone"), "train", (), 2012)
    split = (f"{row[0]}_split", row[1], "val", (), 2012)
    first, second = inspected(voc=(gone, split))
    assert kinds(first) == {problems.MISSING_FOLDER} and kinds(second) == {problems.MISSING_SPLIT}


def test_sets_that_are_registered_elsewhere(tmp_path):
    def fail():
        raise RuntimeError("no such table")

    path, name = tmp_path / "a.png", tmp_path.name
    write_image(path, *WIDE, seed=0)
    record = {"file_name": str(path), "height": 40, "width": 60, "annotations": []}
    DatasetCatalog.register(f"{name}_a", lambda: [record, {}])
    DatasetCatalog.register(f"{name}_b", fail)
    MetadataCatalog.get(f"{name}_a").thing_classes = ["cat"]
    names = (f"{name}_a", f"{name}_b", "coco_2017_val", f"{name}_c")
    found = dict(zip("abvc", inspected(train=(), test=names)))
    assert sentences(found["a"], problems.MALFORMED_RECORD) == ["record 1 (None) lacks 'file_name'"]
    assert "RuntimeError: no such table" in sentences(found["b"], problems.NO_LOADING)[0]
    assert kinds(found["v"]) == {problems.MISSING_FILE}
    assert "which is not registered" in sentences(found["c"], problems.NO_LOADING)[0]


def test_no_data_set():
    with pytest.raises(UserError, match="DATASETS.TRAIN and DATASETS.TEST are empty; name"):
        inspected(train=())


def test_the_first_error_is_what_training_refuses(tmp_path):
    """One implementation of the rules."""

    def edit(content):
        content["annotations"][1]["category_id"] = 7

    row = write_coco(tmp_path, edit=edit)
    [found] = inspected(row)
    first = next(problem for problem in found.problems if problem.kind.is_error)
    with pytest.raises(UserError) as error:
        register_datasets(small_cfg(DATASETS__COCO=(row,)))
    assert str(error.value).endswith(f"{first.sentence}; {first.kind.remedy}.")
    assert json.loads((tmp_path / "set.json").read_text())["annotations"][1]["category_id"] == 7

"""Wrong fields, pictures and box forms of data sets: training and tools/check_data.py refuse the same with the same words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_distill.apps.data_check.inspection import inspect_annotations, inspect_images
from d2_distill.data import problems
from d2_distill.data.checks import check_dataset, check_datasets
from d2_distill.data.loader import SeededMapDataset, build_train_loader
from d2_distill.data.mapper import CheckedDatasetMapper
from d2_distill.data.pictures import read_image
from d2_distill.data.registration import register_datasets
from d2_distill.errors import UserError

from ..data.small_sets import WIDE, small_cfg, write_coco, write_image, write_voc

NAN, INF = float("nan"), float("inf")
MISSING = object()


def refusal(*coco, voc=(), evaluated=False):
    """The sentence with which a run refuses data; None if it takes them."""
    rows = (*coco, *voc)
    names = tuple(row[0] for row in rows)
    cfg = small_cfg(DATASETS__COCO=coco, DATASETS__VOC=voc)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((), names) if evaluated else (names, ())
    try:
        register_datasets(cfg)
        check_datasets(cfg, train=not evaluated)
    except UserError as error:
        return str(error)
    finally:
        for name in names:
            if name in DatasetCatalog.list():
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
    return None


def errors(*coco, voc=(), evaluated=False):
    """What tools/check_data.py says of the same data."""
    cfg = small_cfg(DATASETS__COCO=coco, DATASETS__VOC=voc)
    names = tuple(row[0] for row in (*coco, *voc))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((), names) if evaluated else (names, ())
    [found] = inspect_annotations(cfg)
    return [problem.sentence for problem in found.problems if problem.kind.is_error]


def both_refuse(*coco, says, **options):
    sentence, told = refusal(*coco, **options), errors(*coco, **options)
    assert sentence is not None and says in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".") and "; " in sentence
    assert any(each in sentence for each in told), (sentence, told)


def changed(section, field, value, number=1):
    def edit(content):
        if field is None:
            content[section][number] = value
        elif value is MISSING:
            del content[section][number][field]
        else:
            content[section][number][field] = value

    return edit


@pytest.mark.parametrize("section, field, value, says", [
    *[("annotations", "iscrowd", value, "annotation 2 has the iscrowd") for value in (None, "0", "1", True, False, 2, -1, 0.5, [])],
    *[
        ("annotations", "bbox", value, "annotation 2 has the bbox")
        for value in (
            None, [], [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [[1, 2, 3, 4]], "1 2 3 4", {"x": 1},
            [1, 2, None, 4], [1, 2, True, 4], [1, 2, 10**400, 4],
        )
    ],
    *[("annotations", "bbox", [2, value, 8, 6], "is not finite") for value in (NAN, INF, -INF, 1e400)],
    ("annotations", "category_id", 20.0, "annotation 2 has the category_id 20.0, which is a float"),
    *[("annotations", "category_id", value, "annotation 2 has the category_id") for value in ("20", None, True, [20])],
    ("annotations", "image_id", 101.0, "annotation 2 has the image_id 101.0, which is a float"),
    *[("annotations", "image_id", value, "annotation 2 has") for value in ("101", None, True, "")],
    ("annotations", "id", 2.0, "has the id 2.0, which is a float"),
    ("annotations", "id", 1, "two entries of 'annotations' have the id 1"),
    *[("annotations", "id", value, "entry 1 of 'annotations'") for value in (None, True, "", 2**70, MISSING)],
    *[("annotations", "segmentation", value, "annotation 2 has the segmentation") for value in ("x", 5, [1, 2, 3, 4, 5, 6], [None])],
    *[("annotations", "ignore", value, "annotation 2 has") for value in (1, True, None, "0")],
    *[("annotations", None, value, "entry 1 of 'annotations' lacks 'id'") for value in (None, 5, [], {})],
    ("images", "id", 101.5, "has the id 101.5, which is a float"),
    *[("images", "id", value, "of 'images'") for value in (None, "101", False, 100)],
    *[("images", side, value, f"image 101 has the {side}")
      for side in ("width", "height") for value in ("30", 0, -30, 30.5, None, NAN, INF, True, 2**40, [30])],
    *[("images", "file_name", value, "image 101 has the file_name") for value in (None, 7, "", " ", [], "a\0.png")],
    ("images", None, None, "entry 1 of 'images' lacks 'id'"),
    ("categories", "name", MISSING, "entry 1 of 'categories' lacks 'name'"),
    ("categories", "id", MISSING, "entry 1 of 'categories' lacks 'id'"),
    ("categories", "id", 20.0, "has the id 20.0, which is a float"),
    *[("categories", "id", value, "of 'categories'") for value in ("20", None, True, 10)],
    *[("categories", "name", value, "category 20 has the name") for value in (None, 5, "", "  ")],
    ("categories", None, None, "entry 1 of 'categories' lacks 'id'"),
])  # fmt: skip
def test_fields_of_coco_files(tmp_path, section, field, value, says):
    both_refuse(write_coco(tmp_path, edit=changed(section, field, value)), says=says)


@pytest.mark.parametrize("area", [None, "48", NAN, INF, -1, True, [48]])
def test_areas_are_needed_for_evaluation_only(tmp_path, area):
    row = write_coco(tmp_path, edit=changed("annotations", "area", area))
    both_refuse(row, evaluated=True, says="annotation 2 has the area")
    assert refusal(row) is None and errors(row) == []


@pytest.mark.parametrize("edit", [
    changed("annotations", "iscrowd", 0.0), changed("annotations", "iscrowd", MISSING), changed("images", "width", 20.0),
    changed("annotations", "segmentation", None), changed("annotations", "ignore", 0),
    changed("annotations", "bbox", [2.5, 3, 8, 6.25]), changed("annotations", "id", 0),
])  # fmt: skip
def test_what_other_tools_write_is_taken(tmp_path, edit):
    row = write_coco(tmp_path, edit=edit)
    assert refusal(row) is None and errors(row) == []


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [MISSING, None, {}, "x"])
def test_lists_of_coco_files(tmp_path, name, value):
    def edit(content):
        content[name] = value
        if value is MISSING:
            del content[name]

    both_refuse(write_coco(tmp_path, edit=edit), says=f"'{name}' is {'missing' if value is MISSING else 'no list'}")


def test_list_that_is_there_twice(tmp_path):
    row = write_coco(tmp_path)
    path = tmp_path / "set.json"
    path.write_text(path.read_text().replace('"categories"', '"annotations": [], "categories"'))
    both_refuse(row, says="has the list 'annotations' twice")
    path.write_text(path.read_text().replace('"annotations": [], ', '"info": {"annotations": "mine"}, '))
    assert refusal(row) is None


def test_masks_are_checked_where_they_are_read(tmp_path):
    polygon = [2, 3, 10, 3, 10, 9]
    good = ([polygon], {"size": [30, 20], "counts": [43, 6, 551]}, [polygon, [1, 2]])
    bad = ([["2", 3, 10, 3, 10, 9]], [[NAN, *polygon[1:]]], {"size": [20, 30], "counts": [600]}, {"counts": [600]}, {"size": [30, 20]})
    for number, segmentation in enumerate((*good, *bad)):
        row = write_coco(tmp_path / str(number), name=tmp_path.name, edit=changed("annotations", "segmentation", segmentation))
        cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), MODEL__MASK_ON=True)
        if number < len(good):
            register_datasets(cfg)
        else:
            with pytest.raises(UserError, match="annotation 2 has a segmentation that is no polygons or run lengths"):
                register_datasets(cfg)
            [found] = inspect_annotations(cfg)
            assert any("annotation 2 has a segmentation" in problem.sentence for problem in found.problems)


class TestForms:
    """Boxes that are written in another form than they are read in."""

    def scattered(self, number=12, seed=0):
        """(N, 4) corners in images of 30 x 20."""
        rng = np.random.RandomState(seed)
        corner = rng.uniform(0, 0.7, (number, 2)) * WIDE
        return np.concatenate([corner, corner + rng.uniform(0.1, 0.28, (number, 2)) * WIDE], axis=1)

    def written(self, folder, boxes):
        def edit(content):
            first = content["annotations"][0]
            content["annotations"] = [
                {**first, "id": 1 + index, "image_id": 100 + index % 3, "bbox": list(map(float, box))}
                for index, box in enumerate(boxes)
            ]

        return write_coco(folder, sizes=(WIDE,) * 3, edit=edit)

    def test_corners(self, tmp_path):
        both_refuse(self.written(tmp_path, self.scattered()), says="convert all boxes to x, y, width, height")

    def test_relative_numbers(self, tmp_path):
        corners = self.scattered() / [*WIDE, *WIDE]
        both_refuse(self.written(tmp_path / "corners", corners), says="multiply x and width by the image's width")
        sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        both_refuse(self.written(tmp_path / "sides", sides), says="lies within the image's first pixel, as 12 of the 12")
        mixed = np.concatenate([sides[:8], self.scattered(4) * 0.5])
        both_refuse(self.written(tmp_path / "mixed", mixed), says="lies within the image's first pixel")

    def test_good_boxes_are_never_refused(self, tmp_path):
        for seed in range(5):
            corners = self.scattered(seed=seed)
            sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            assert refusal(self.written(tmp_path / str(seed), sides)) is None
        large = [[2, 1, 26, 18], [0, 0, 30, 20], [3, 2, 29, 19], [1, 1, 30, 20]]  # carelessly drawn, from the upper left
        assert refusal(self.written(tmp_path / "large", large * 3)) is None
        full_body = np.concatenate([corners[:, :2], np.full((12, 2), (9, 14))], axis=1)  # guessed beyond the border
        assert refusal(self.written(tmp_path / "guessed", full_body)) is None
        tiny = [[0, 0, 1, 1], *sides]
        assert refusal(self.written(tmp_path / "tiny", tiny)) is None

    def test_relative_numbers_in_voc(self, tmp_path):
        both_refuse(voc=(write_voc(tmp_path, objects=([("cat", 0.1, 0.2, 0.4, 0.6)], [("dog", 0, 0, 1, 1)])),),
                    says="multiply x and width")  # fmt: skip


@pytest.mark.parametrize("old, new, says", [
    ("<xmin>3</xmin>", "<xmin>left</xmin>", "object 0 has 'left' as <bndbox/xmin>"),
    ("<xmin>3</xmin>", "<xmin>nan</xmin>", "object 0 has 'nan' as <bndbox/xmin>"),
    ("<xmin>3</xmin>", "", "object 0 has None as <bndbox/xmin>"),
    ("bndbox>", "box>", "object 0 has None as <bndbox/xmin>"),
    ("<xmin>3</xmin>", "<xmin>15</xmin>", "has no area"),
    ("<difficult>0<", "<difficult>yes<", "object 0 has 'yes' as <difficult>"),
    ("<difficult>0<", "<difficult>2<", "object 0 has '2' as <difficult>"),
    ("<name>cat</name>", "", "object 0 has no <name>"),
    ("<name>cat</name>", "<name> </name>", "object 0 has no <name>"),
    ("<width>30<", "<width>-30<", "has the size -30 x 20"),
    ("<width>30<", "<width>wide<", "has 'wide' as <size/width>"),
])
def test_fields_of_voc_files(tmp_path, old, new, says):
    row = write_voc(tmp_path)
    path = tmp_path / "Annotations" / "0.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    both_refuse(voc=(row,), says=says)


def test_image_that_a_split_lists_twice(tmp_path):
    row = write_voc(tmp_path)
    split = tmp_path / "ImageSets" / "Main" / "train.txt"
    split.write_text(split.read_text() + "\n0\n")
    both_refuse(voc=(row,), says="lists 0 2 times")


@pytest.mark.parametrize("field, value, says", [
    ("iscrowd", None, "the iscrowd is None"), ("iscrowd", "0", "the iscrowd is '0'"),
    ("bbox", ["1", 2, 3, 4], "not four numbers"), ("bbox", None, "not four numbers"),
    ("category_id", 1.0, "the category_id is 1.0"), ("category_id", True, "the category_id is True"),
    ("category_id", MISSING, "lacks 'category_id'"), ("bbox_mode", MISSING, "lacks 'bbox_mode'"),
    ("bbox_mode", 2, "the bbox_mode is 2"), ("width", "30", "the width '30'"), ("height", 0, "the height 0"),
    ("file_name", None, "the file_name None"),
])  # fmt: skip
def test_records_from_python(tmp_path, field, value, says):
    """Where no file tells more, as in the data sets of Detectron2's own catalog."""
    write_image(tmp_path / "a.png", *WIDE, seed=0)
    row = {"bbox": np.array([2, 3, 8, 6]), "bbox_mode": 1, "category_id": np.int64(0), "iscrowd": False}
    record = {"file_name": str(tmp_path / "a.png"), "width": WIDE[0], "height": WIDE[1], "image_id": 1, "annotations": [row]}
    name = f"records_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    try:
        target = record if field in record else row
        if value is MISSING:
            del target[field]
        else:
            target[field] = value
        with pytest.raises(UserError, match=says):
            check_dataset(name, key="DATASETS.TRAIN")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class TestPictures:
    def test_paths_of_windows(self, tmp_path):
        row = write_coco(tmp_path, edit=changed("images", "file_name", "sub\\1.png"))
        (tmp_path / "images" / "sub").mkdir()
        (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "sub" / "1.png")
        both_refuse(row, says="its name has backslashes")
        assert f"but there is {row[2]}/sub/1.png" in refusal(row)

    def test_folder_in_the_place_of_a_file(self, tmp_path):
        row = write_coco(tmp_path)
        (tmp_path / "images" / "1.png").unlink()
        (tmp_path / "images" / "1.png").mkdir()
        both_refuse(row, says="1.png is a folder")

    @pytest.mark.parametrize("decode", [True, False])
    def test_picture_that_its_metadata_turn(self, tmp_path, decode):
        row = write_coco(tmp_path, sizes=(WIDE,))
        path = tmp_path / "images" / "0.png"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
        cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],))
        found = inspect_annotations(cfg)
        inspect_images(found, decode=decode, step=lambda: None)
        [sentence] = [problem.sentence for problem in found[0].problems if problem.kind is problems.BAD_IMAGE]
        assert sentence.endswith("says 30 x 20, which is that of the picture before its EXIF orientation turns it")
        record = {"file_name": str(path), "width": 30, "height": 20, "annotations": []}
        with pytest.raises(UserError, match=f"{sentence}; correct the annotation"):
            CheckedDatasetMapper(cfg, is_train=True)(record)

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
    def test_pictures_of_16_bits(self, tmp_path, suffix):
        """A gray ramp is the same in 8 and in 16 bits, for the mapper of training as for the tools."""
        gray = np.linspace(0, 255, 40 * 60).reshape(40, 60).round().astype(np.uint16)
        path = tmp_path / f"a.{suffix}"
        if suffix == "pgm":
            path.write_bytes(b"P5 60 40 65535\n" + (gray * 257).astype(">u2").tobytes())
        else:
            Image.fromarray(gray * 257).save(path)
        assert (read_image(str(path), "BGR") == gray[:, :, None]).all()
        assert (read_image(str(path), "L")[:, :, 0] == gray).all() and (read_image(str(path)) == gray).all()
        cfg = small_cfg()
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 40, 100
        sample = CheckedDatasetMapper(cfg, is_train=False)({"file_name": str(path), "width": 60, "height": 40})
        assert (sample["image"].numpy() == gray).all()

    def test_range_of_12_bits_and_turned_picture(self, tmp_path):
        gray = (np.arange(2400) % 256).reshape(40, 60).astype(np.uint16)
        (tmp_path / "a.pgm").write_bytes(b"P5 60 40 4095\n" + (gray * 16).astype(">u2").tobytes())
        assert np.abs(read_image(str(tmp_path / "a.pgm"), "L")[:, :, 0].astype(int) - gray).max() <= 1
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(gray * 257).save(tmp_path / "a.png", exif=exif)
        assert (read_image(str(tmp_path / "a.png"), "RGB")[:, :, 0] == np.rot90(gray, -1)).all()

    @pytest.mark.parametrize("pixels", [np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32)])
    def test_ranges_that_are_not_known(self, tmp_path, pixels):
        Image.fromarray(pixels).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match="a.tif cannot be read .its pixels are .* convert it to 8 or 16 bits"):
            CheckedDatasetMapper(small_cfg(), is_train=False)({"file_name": str(tmp_path / "a.tif"), "width": 4, "height": 4})

    @pytest.mark.parametrize("mode, suffix", [
        ("1", "png"), ("L", "png"), ("L", "gif"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "tif"), ("CMYK", "jpg"),
    ])
    def test_modes_of_8_bits(self, tmp_path, mode, suffix):
        gray = np.zeros((16, 16, 3), np.uint8)
        gray[:, 8:] = 255
        Image.fromarray(gray).convert(mode).save(tmp_path / f"a.{suffix}")
        assert np.abs(read_image(str(tmp_path / f"a.{suffix}"), "BGR").astype(int) - gray).max() <= 3

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
    def test_thin_pictures(self, tmp_path, size):
        row = write_coco(tmp_path, sizes=(size, size), edit=lambda content: [
            each.update(bbox=[0, 0, min(size[0], 400), min(size[1], 400)]) for each in content["annotations"]
        ])
        cfg = small_cfg(DATASETS__COCO=(row,), DATASETS__TRAIN=(row[0],), INPUT__CROP__ENABLED=True)
        register_datasets(cfg)
        check_datasets(cfg)
        batch = next(iter(build_train_loader(cfg)))
        assert all(min(sample["image"].shape[1:]) == 1 and max(sample["image"].shape[1:]) > 1 for sample in batch)
        [found] = inspect_annotations(cfg)
        assert problems.THIN in {problem.kind for problem in found.problems}


def test_mapper_that_leaves_images_out():
    """Another one takes its place, and the same one after a resume."""
    records = torch.utils.data.StackDataset(torch.arange(10))
    dataset = SeededMapDataset(records, lambda record: {"number": record} if record[0] % 5 == 0 else None, seed=3)
    numbers = [int(dataset[index, position]["number"][0]) for position in range(8) for index in (0, 1, 2)]
    assert set(numbers) == {0, 5} and numbers[::3] == [0] * 8
    assert numbers == [int(dataset[index, position]["number"][0]) for position in range(8) for index in (0, 1, 2)]
    with pytest.raises(UserError, match="returns None for every image"):
        SeededMapDataset(records, lambda record: None, seed=3)[0, 0]


def test_file_is_left_as_it_is(tmp_path):
    row = write_coco(tmp_path, edit=changed("annotations", "iscrowd", None))
    before = (tmp_path / "set.json").read_bytes()
    both_refuse(row, says="iscrowd")
    assert (tmp_path / "set.json").read_bytes() == before and json.loads(before)["annotations"][1]["iscrowd"] is None

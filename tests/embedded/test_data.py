"""Catalogs, readers, transforms, mapper and loaders, as far as no recording covers them."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from PIL import Image

from d2_distill import provider

from .detection_data import registered

NAME = "embedded_test_data"
embedded_only = pytest.mark.skipif(provider.name() == "real", reason="the real Detectron2 has this feature")


def _register(name, dicts, thing_classes=("p", "q")):
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).thing_classes = list(thing_classes)


def _record(image_id, *classes, crowd=0):
    annotations = [
        {"bbox": [1.0, 2.0, 3.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": c, "iscrowd": crowd}
        for c in classes
    ]
    return {"file_name": "x.png", "height": 10, "width": 20, "image_id": image_id, "annotations": annotations}


# catalogs


def test_a_name_is_registered_once():
    with registered(NAME, _register, [_record(1, 0)]):
        assert NAME in DatasetCatalog.list()
        with pytest.raises(AssertionError, match=NAME):
            DatasetCatalog.register(NAME, list)
    with pytest.raises(KeyError, match="coco_2017_val"):  # the message lists the known names
        DatasetCatalog.get(NAME)


def test_metadata_keeps_its_values():
    metadata = MetadataCatalog.get(NAME)
    try:
        assert metadata.set(year=2007, names=["a"]) is metadata
        metadata.year = 2007
        with pytest.raises(AssertionError, match="2012"):
            metadata.year = 2012
        with pytest.raises(AttributeError, match="colour"):
            metadata.colour
        assert metadata.get("colour", 3) == 3
    finally:
        MetadataCatalog.remove(NAME)


# COCO and VOC


def _coco_file(path, annotations):
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (2, 1)]
    categories = [{"id": 5, "name": "x"}, {"id": 3, "name": "y"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def _annotation(id, **changes):
    fixed = {"image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    return {"id": id, **fixed, **changes}


@pytest.mark.parametrize(
    "annotations, error",
    [
        ([_annotation(1), _annotation(1)], AssertionError),
        ([_annotation(1, ignore=1)], AssertionError),
        ([_annotation(1, bbox=[])], ValueError),
        ([_annotation(1, category_id=4)], KeyError),
    ],
)
def test_faulty_coco_annotations(tmp_path, annotations, error):
    json_file = _coco_file(tmp_path / "a.json", annotations)
    with registered(NAME, register_coco_instances, {}, json_file, ""):
        with pytest.raises(error):
            DatasetCatalog.get(NAME)


def test_coco_annotations_without_valid_polygon_are_dropped(tmp_path):
    broken, valid = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]
    annotations = [
        _annotation(1, segmentation=[broken]),
        _annotation(2, segmentation=[broken, valid], iscrowd=1),
        _annotation(3, segmentation=[]),
    ]
    json_file = _coco_file(tmp_path / "a.json", annotations)
    with registered(NAME, register_coco_instances, {}, json_file, "root"):
        dicts = DatasetCatalog.get(NAME)
    assert [d["file_name"] for d in dicts] == ["root/1.png", "root/2.png"]
    assert [a["iscrowd"] for a in dicts[0]["annotations"]] == [1, 0]
    assert [a["category_id"] for a in dicts[0]["annotations"]] == [1, 1]  # id 5, the second of 3 and 5


# images and annotations


def test_read_image(tmp_path):
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    path = str(tmp_path / "a.png")
    Image.fromarray(pixels).save(path)
    assert (utils.read_image(path, "RGB") == pixels).all()
    assert (utils.read_image(path, "BGR") == pixels[:, :, ::-1]).all()
    assert utils.read_image(path, "L").shape == (6, 4, 1)

    rotated = Image.Exif()
    rotated[0x0112] = 6  # the picture has to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(path, exif=rotated)
    assert (utils.read_image(path, "RGB") == np.rot90(pixels, -1)).all()


def test_check_image_size():
    image, record = np.zeros((6, 4, 3), np.uint8), {}
    utils.check_image_size(record, image)
    assert record == {"height": 6, "width": 4}
    with pytest.raises(utils.SizeMismatchError):
        utils.check_image_size({"file_name": "a.png", "height": 4, "width": 6}, image)


def test_annotations_are_transformed_and_clipped():
    annotation = {"bbox": [-3.0, 2.0, 30.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    transforms = T.TransformList([T.HFlipTransform(20), T.ResizeTransform(10, 20, 20, 60)])
    changed = utils.transform_instance_annotations(annotation, transforms, (20, 60))
    assert changed["bbox"].tolist() == [0.0, 4.0, 60.0, 12.0]
    instances = utils.annotations_to_instances([changed], (20, 60))
    assert instances.gt_boxes.tensor.tolist() == [[0.0, 4.0, 60.0, 12.0]]
    assert instances.gt_classes.dtype == torch.int64
    assert utils.annotations_to_instances([], (20, 60)).gt_boxes.tensor.shape == (0, 4)


# transforms


def test_gray_images_keep_their_channel():
    image = np.random.RandomState(0).randint(0, 255, (6, 4, 1)).astype(np.uint8)
    tfm = T.ResizeTransform(6, 4, 3, 5)
    resized = tfm.apply_image(image)
    assert resized.shape == (3, 5, 1) and resized.dtype == np.uint8
    assert (resized[:, :, 0] == tfm.apply_image(image[:, :, 0])).all()


def test_length_zero_does_not_resize():
    tfm = T.ResizeShortestEdge((0,), 10, "choice").get_transform(np.zeros((3, 4, 3), np.uint8))
    assert isinstance(tfm, T.NoOpTransform)


@pytest.mark.parametrize("horizontal, vertical", [(True, True), (False, False)])
def test_a_flip_has_one_direction(horizontal, vertical):
    with pytest.raises(ValueError):
        T.RandomFlip(horizontal=horizontal, vertical=vertical)


# mapper


def test_mapper_crops_first_and_drops_emptied_boxes(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    corners = [[0, 0, 4, 4], [36, 0, 40, 4], [0, 36, 4, 40], [36, 36, 40, 40]]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "annotations": [
            {"bbox": [float(x) for x in c], "bbox_mode": BoxMode.XYXY_ABS, "category_id": k}
            for k, c in enumerate(corners)
        ],
    }
    cfg = get_cfg()
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [20, 20]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (30,), "none"
    np.random.seed(0)
    mapped = DatasetMapper(cfg, True)(record)
    assert mapped["image"].shape == (3, 30, 30)
    assert (mapped["height"], mapped["width"]) == (40, 40)
    # a window of 20 pixels cannot reach two boxes that are 32 pixels apart
    assert len(mapped["instances"]) <= 1
    assert mapped["instances"].image_size == (30, 30)


def test_mapper_without_annotations(tmp_path):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    mapped = DatasetMapper(get_cfg(), True)({"file_name": str(tmp_path / "a.png")})
    assert sorted(mapped) == ["file_name", "height", "image", "width"]


# data sets and loaders


def test_dataset_from_list_hands_out_copies():
    elements = [{"a": [1]}, {"a": [2]}]
    dataset = DatasetFromList(elements)
    dataset[1]["a"].append(3)
    assert [dataset[i] for i in range(len(dataset))] == [{"a": [1]}, {"a": [2]}]


def test_dataset_dicts_are_filtered():
    dicts = [_record("a", 0, 1), _record("b"), _record("c", 1, crowd=1)]
    with registered(NAME, _register, dicts):
        assert [d["image_id"] for d in get_detection_dataset_dicts(NAME)] == ["a"]
        unfiltered = get_detection_dataset_dicts([NAME], filter_empty=False)
        assert [d["image_id"] for d in unfiltered] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "dicts",
    [[], [_record(1, 0, crowd=1)], [_record(1, 2)]],
    ids=["empty", "only crowds", "class out of range"],
)
def test_unusable_datasets(dicts):
    with registered(NAME, _register, dicts):
        with pytest.raises(AssertionError):
            get_detection_dataset_dicts(NAME)


def test_datasets_of_different_classes_are_not_mixed():
    with registered(NAME, _register, [_record(1, 0)]):
        with registered(NAME + "_2", _register, [_record(1, 0)], ("q", "p")):
            with pytest.raises(ValueError):
                get_detection_dataset_dicts([NAME, NAME + "_2"])


@embedded_only
def test_objects_are_counted(caplog):
    names = ("a long name", "b", "c", "d")
    logger = logging.getLogger("detectron2.data.build")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with registered(NAME, _register, [_record(1, 0, 0, 3)], names):
            get_detection_dataset_dicts(NAME)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    lines = [re.split(" {2,}", line.strip()) for line in caplog.messages[-1].splitlines()]
    assert lines[1:] == [["a long name", "2", "b", "0", "c", "0"], ["d", "1", "total", "3"]]


@pytest.mark.parametrize("size", [0, -1])
def test_training_sampler_needs_a_positive_size(size):
    with pytest.raises(ValueError):
        TrainingSampler(size, seed=0)


def test_test_loader_gives_every_image_once(tmp_path):
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "x.png")
    dicts = [dict(_record(i, i % 2), file_name=str(tmp_path / "x.png")) for i in range(5)]
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS, cfg.INPUT.MIN_SIZE_TEST = 0, 20
    with registered(NAME, _register, dicts):
        batches = list(build_detection_test_loader(cfg, NAME))
        mapped = list(build_detection_test_loader(cfg, NAME, mapper=lambda record: record["image_id"]))
    assert [d["image_id"] for batch in batches for d in batch] == [0, 1, 2, 3, 4]
    assert batches[0][0]["image"].shape == (3, 20, 40)
    assert mapped == [[0], [1], [2], [3], [4]]
